"""A drive that fails while activations pass through it: who trains is told, and the same batch can be taken again."""

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
from penstock.runtime.training import activations

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All activations go to disk."""
    room = activations.ActivationRoom(kept_nbytes=0, host_nbytes=0, buffer_nbytes=64 << 10)
    monkeypatch.setattr(activations, "room_for_activations", lambda *_: room)


def build() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(96, 96), nn.Tanh()]
    return nn.Sequential(*layers)


def backward(model: nn.Module, seed: int) -> float:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def train(model: nn.Module, optimizer: Any, seeds: Sequence[int]) -> list[float]:
    losses = []
    for seed in seeds:
        losses.append(backward(model, seed))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def prepare(folder: Path, device: str, kind: str) -> tuple[Any, Any]:
    memory = {"host": 2**28, **({"device": 2**28} if device == "emulated" else {})}
    return penstock.prepare(
        build(),
        optimizer=penstock.AdamW(lr=1e-2, max_grad_norm=1.0),
        disk=folder,
        max_memory=memory,
        device=device,
        activations=kind,  # type: ignore[arg-type]
    )


@pytest.fixture(params=["cpu", "emulated"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A training whose activations are on disk."""
    model, optimizer = prepare(tmp_path / "run", request.param, "offload")
    yield model, optimizer
    penstock.close(model)


@pytest.fixture
def expected(tmp_path: Path) -> list[float]:
    """Losses of five steps that nothing disturbs."""
    model, optimizer = prepare(tmp_path / "undisturbed", "cpu", "keep")
    try:
        return train(model, optimizer, range(5))
    finally:
        penstock.close(model)


def break_file(engine: Any, number: int, *, after: int = 0, reads: bool = True) -> Callable[[], None]:
    """Let requests for activations fail after so many; returns what mends it."""
    plain = engine.pread, engine.pwrite
    left = [after]

    def failing(work: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("activations.bin"):
                if left[0] == 0:
                    raise OSError(number, os.strerror(number))
                left[0] -= 1
            return work(fd, buffers, offset)

        return call

    def mend() -> None:
        engine.pread, engine.pwrite = plain

    engine.pwrite = failing(os.pwritev)
    if reads:
        engine.pread = failing(os.preadv)
    return mend


def store_of(model: Any) -> Any:
    return model.penstock.machinery.session.saved.keeper.store


def landed(model: Any) -> None:
    """Wait until all that a forward has saved is on disk."""
    store = store_of(model)
    with store.changed:
        assert store.changed.wait_for(lambda: not store.leaving_nbytes and len(store.out_buffers) == 4, timeout=20)


@pytest.mark.parametrize("after", [0, 3, 7])
@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "full"), (errno.EIO, "dmesg")])
def test_what_cannot_be_written_or_read_costs_this_batch_only(
    number: int, remedy: str, after: int, run: tuple[Any, Any], expected: list[float]
) -> None:
    model, optimizer = run
    found = train(model, optimizer, range(2))
    optimizer.training.finish()
    mend = break_file(model.penstock.machinery.engine, number, after=after)
    match = rf"activation \d+ of .*offset \d+ of .*activations\.bin.*{remedy}.*zero_grad"

    def attempt() -> None:
        for _ in range(10):  # what was still in memory when backward came needs no drive
            backward(model, 2)
            landed(model)
            optimizer.zero_grad()

    with pytest.raises(penstock.DiskError, match=match):
        attempt()
    mend()
    optimizer.zero_grad()
    found += train(model, optimizer, range(2, 5))
    assert found == expected


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_bytes_that_are_not_those_that_were_written_never_reach_a_gradient(
    how: str, run: tuple[Any, Any], expected: list[float], tmp_path: Path
) -> None:
    model, optimizer = run
    found = train(model, optimizer, range(2))
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    loss = model(x).square().mean()
    landed(model)
    (file,) = (tmp_path / "run" / "scratch").rglob("activations.bin")
    if how == "flipped":
        with file.open("r+b") as raw:
            content = bytearray(raw.read())
            for at in range(100, len(content), 4096):
                content[at] ^= 16
            raw.seek(0)
            raw.write(content)
            os.fsync(raw.fileno())
    else:
        os.truncate(file, 0)
    with pytest.raises(penstock.PenstockError, match=r"activation \d+ of .*activations\.bin"):
        loss.backward()
    del loss
    optimizer.zero_grad()
    found += train(model, optimizer, range(2, 5))
    assert found == expected


def test_a_short_write_is_finished(run: tuple[Any, Any], expected: list[float]) -> None:
    model, optimizer = run
    engine = model.penstock.machinery.engine
    engine.pwrite = lambda fd, buffers, offset: os.pwritev(fd, [buffers[0][:4096]], offset)
    assert train(model, optimizer, range(5)) == expected


def test_closing_between_forward_and_backward_leaves_nothing_behind(run: tuple[Any, Any]) -> None:
    model, _ = run
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    loss = model(x).square().mean()
    penstock.close(model)
    with pytest.raises(penstock.PenstockError):
        loss.backward()
