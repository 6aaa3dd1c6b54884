"""A drive that fails while gradients or states pass through it: who trains is told, and the run is where it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock.runtime.training import preparing, room

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so short that the buffers which gradients pass through are less than all gradients of a small model."""
    for user in (preparing, room):
        monkeypatch.setattr(user, "ELEMENTS", 1024)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))


def prepare(folder: Path, memory: dict[str, int]) -> tuple[Any, Any]:
    return penstock.prepare(
        build(),
        optimizer=penstock.AdamW(lr=1e-2, max_grad_norm=1.0),
        disk=folder,
        max_memory=memory,
        device="cpu",
        activations="keep",
    )


def backward(model: nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def train(model: nn.Module, optimizer: Any, seeds: Sequence[int]) -> list[float]:
    losses = []
    for seed in seeds:
        losses.append(float(backward(model, seed)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture
def spilling(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A training whose gradients are on disk."""
    with pytest.raises(penstock.DoesNotFitError) as caught:
        prepare(tmp_path / "run", {"host": 1})
    model, optimizer = prepare(tmp_path / "run", {"host": caught.value.needed_nbytes})
    assert (tmp_path / "run" / "scratch").exists()
    assert optimizer.training.gradients.spill is not None
    yield model, optimizer
    penstock.close(model)


@pytest.fixture
def expected(tmp_path: Path) -> list[float]:
    """Losses of five steps that nothing disturbs."""
    model, optimizer = prepare(tmp_path / "undisturbed", {"host": 2**28})
    try:
        return train(model, optimizer, range(5))
    finally:
        penstock.close(model)


def break_file(engine: Any, name: str, number: int, *, after: int = 0) -> Callable[[], None]:
    """Let reads and writes of files of that name fail after so many; returns what mends it."""
    plain = engine.pread, engine.pwrite
    left = [after]

    def failing(work: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(name):
                if left[0] == 0:
                    raise OSError(number, os.strerror(number))
                left[0] -= 1
            return work(fd, buffers, offset)

        return call

    def mend() -> None:
        engine.pread, engine.pwrite = plain

    engine.pread, engine.pwrite = failing(os.preadv), failing(os.pwritev)
    return mend


@pytest.mark.parametrize("after", [0, 3, 20])
@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "full"), (errno.EIO, "dmesg")])
def test_a_gradient_that_cannot_be_written_costs_this_step_only(
    number: int, remedy: str, after: int, spilling: tuple[Any, Any], expected: list[float]
) -> None:
    """It is said in backward or by `step()`; no weight has changed, and the same batch can be taken again."""
    model, optimizer = spilling
    found = train(model, optimizer, range(2))
    optimizer.training.finish()
    mend = break_file(model.penstock.machinery.engine, "gradients.bin", number, after=after)

    def attempt() -> None:
        backward(model, 2)
        optimizer.step()

    with pytest.raises(penstock.DiskError, match=rf"gradient of \S+ \(block \d+\).*gradients\.bin.*{remedy}"):
        attempt()
    mend()
    optimizer.zero_grad()
    found += train(model, optimizer, range(2, 5))
    assert found == expected


def test_a_step_after_a_failed_backward_is_refused(spilling: tuple[Any, Any], expected: list[float]) -> None:
    model, optimizer = spilling
    mend = break_file(model.penstock.machinery.engine, "gradients.bin", errno.EIO)

    def attempt() -> None:
        backward(model, 0)
        optimizer.training.gradients.spill.settle()

    with pytest.raises(penstock.DiskError, match="gradient of"):
        attempt()
    mend()
    with pytest.raises(penstock.DiskError, match="gradient of"):
        optimizer.step()
    assert train(model, optimizer, range(5)) == expected  # and with that it is forgotten


@pytest.mark.parametrize("how", ["unreadable", "truncated"])
def test_a_gradient_that_cannot_be_read_ends_the_run_at_its_last_commit(
    how: str, spilling: tuple[Any, Any], expected: list[float], tmp_path: Path
) -> None:
    model, optimizer = spilling
    found = train(model, optimizer, range(2))
    penstock.save(model, optimizer).wait()
    backward(model, 2)
    optimizer.training.gradients.spill.settle()
    if how == "unreadable":
        break_file(model.penstock.machinery.engine, "gradients.bin", errno.EIO)
    else:
        (file,) = (tmp_path / "run" / "scratch").rglob("gradients.bin")
        os.truncate(file, 0)
    optimizer.step()
    with pytest.raises(penstock.PenstockError, match=r"gradient of \S+ \(block \d+\).*gradients\.bin"):
        optimizer.training.finish()
    with pytest.raises(penstock.PenstockError, match="gradient of"):
        backward(model, 3)
    penstock.close(model)
    model, optimizer = penstock.resume(tmp_path / "run", model=build(), max_memory={"host": 2**28}, device="cpu")
    try:
        assert found + train(model, optimizer, range(2, 5)) == expected
    finally:
        penstock.close(model)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_states_that_cannot_be_written_fail_the_commit_and_the_one_before_stays(
    number: int, expected: list[float], tmp_path: Path
) -> None:
    model, optimizer = prepare(tmp_path / "run", {"host": 2**28})
    found = train(model, optimizer, range(2))
    penstock.save(model, optimizer).wait()
    train(model, optimizer, [2])
    break_file(model.penstock.machinery.engine, "blocks.data", number, after=5)
    with pytest.raises(penstock.PenstockError, match=r"blocks\.data"):
        penstock.save(model, optimizer).wait()  # which of the two depends on when the write has failed

    def go_on() -> None:
        train(model, optimizer, [3])
        optimizer.training.finish()

    with pytest.raises(penstock.PenstockError, match=r"blocks\.data|resume"):
        go_on()
    penstock.close(model)
    model, optimizer = penstock.resume(tmp_path / "run", model=build(), max_memory={"host": 2**28}, device="cpu")
    try:
        assert found + train(model, optimizer, range(2, 5)) == expected
    finally:
        penstock.close(model)


def test_closing_between_backward_and_step_leaves_nothing_behind(spilling: tuple[Any, Any]) -> None:
    model, optimizer = spilling
    backward(model)
    penstock.close(model)
    with pytest.raises(penstock.PenstockError):
        optimizer.step()
