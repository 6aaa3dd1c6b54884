"""Gradients on disk: what comes back is what was given away, and whatever a drive does is said to who needs it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.memory.arena import HostArena
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DiskError, DoesNotFitError, StallError
from penstock.runtime.training.shards import Shard, cut_shards
from penstock.runtime.training.spill import GradientSpill

SIZES = (1500, 700, 9000, 10)
BLOCKS = {1: [0, 1], 2: [2], 3: [3]}
SPILLED = (0, 2, 3)


def shards_of(most: int = 1024) -> tuple[Shard, ...]:
    return cut_shards(SIZES, BLOCKS, most=most)


def make(folder: Path, engine: DiskEngine, *, drives: int = 1, most: int = 1024, **watch: float) -> GradientSpill:
    return GradientSpill(
        ["first", "second", "third", "fourth"],
        SPILLED,
        shards_of(most),
        itemsizes=[4] * len(SIZES),
        engine=engine,
        paths=[str(folder / f"gradients{drive}.bin") for drive in range(drives)],
        **watch,
    )


def values(index: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + index)
    return torch.randn(SIZES[index], generator=generator).to(dtype)


def update(spill: GradientSpill, wanted: Sequence[int], most: int = 1024) -> dict[int, torch.Tensor]:
    """What updates of all shards find, put together."""
    found = {index: torch.full((SIZES[index],), float("nan")) for index in wanted}
    for shard in shards_of(most):
        arena = HostArena(max(spill.beside_nbytes(shard), 1), tier="test")
        read = spill.read(shard, wanted, arena.view(0, arena.nbytes))
        if read is None:
            assert not any(piece.parameter in wanted for piece in shard.pieces)
            continue
        read.wait()
        for piece in shard.pieces:
            if piece.parameter in wanted:
                found[piece.parameter][piece.start : piece.stop] = read.tensors[piece.parameter].float()
        arena.close()
    return found


@pytest.fixture
def engine() -> Iterator[DiskEngine]:
    made = DiskEngine()
    yield made
    made.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    order=st.permutations(SPILLED),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32]), min_size=4, max_size=4),
    drives=st.integers(1, 3),
    most=st.sampled_from([1024, 4096]),
    again=st.lists(st.sampled_from(SPILLED), max_size=4),
)
def test_what_comes_back_is_what_was_given(
    tmp_path: Path,
    engine: DiskEngine,
    order: list[int],
    dtypes: list[torch.dtype],
    drives: int,
    most: int,
    again: list[int],
) -> None:
    spill = make(tmp_path, engine, drives=drives, most=most)
    expected = {}
    for seed, index in enumerate([*order, *again]):  # a later one takes the place of an earlier one
        expected[index] = values(index, seed, dtypes[index])
        given_away = expected[index].clone()
        spill.put(index, given_away)
        given_away.fill_(float("nan"))
    for index, value in expected.items():
        assert torch.equal(spill.get(index), value)
        wide = torch.empty(SIZES[index])
        spill.load(index, wide)
        assert torch.equal(wide, value.float())
    spill.settle()
    found = update(spill, SPILLED, most)
    assert all(torch.equal(found[index], value.float()) for index, value in expected.items())
    some = update(spill, SPILLED[:1], most)
    assert torch.equal(some[0], expected[0].float())
    spill.close()


def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    time.sleep(0.01)
    return os.pwritev(fd, buffers, offset)


def test_a_drive_that_is_slow_never_mixes_two_gradients_of_one_parameter(tmp_path: Path) -> None:
    engine = DiskEngine(pwrite=slow)
    spill = make(tmp_path, engine)
    for seed in range(3):
        spill.put(2, values(2, seed))
        assert torch.equal(spill.get(2), values(2, seed))
        spill.put(0, values(0, seed))
        spill.put(2, values(2, seed + 1))
    spill.settle()
    found = update(spill, (0, 2))
    assert torch.equal(found[2], values(2, 3).float())
    assert torch.equal(found[0], values(0, 2).float())
    spill.close()
    engine.close()


def failing(number: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "full"), (errno.EIO, "dmesg")])
def test_a_write_that_fails_is_told_to_whoever_comes_next(
    number: int, remedy: str, tmp_path: Path, engine: DiskEngine
) -> None:
    spill = make(tmp_path, engine)
    spill.put(0, values(0, 0))
    spill.settle()
    works, engine.pwrite = engine.pwrite, failing(number)
    match = rf"gradient of third \(block 2\).*offset \d+ of .*gradients0\.bin.*{remedy}"

    def put_and_settle() -> None:
        spill.put(2, values(2, 0))
        spill.settle()

    with pytest.raises(DiskError, match=match):
        put_and_settle()
    for use in (spill.settle, lambda: spill.put(0, values(0, 1)), lambda: spill.get(0)):
        with pytest.raises(DiskError, match="gradient of third"):
            use()
    engine.pwrite = works
    spill.forget()  # and a new step begins
    for index in SPILLED:
        spill.put(index, values(index, 2))
    spill.settle()
    found = update(spill, SPILLED)
    assert all(torch.equal(found[index], values(index, 2).float()) for index in SPILLED)
    spill.close()


@pytest.mark.parametrize("how", ["unreadable", "truncated"])
def test_a_read_that_fails_is_told(how: str, tmp_path: Path, engine: DiskEngine) -> None:
    spill = make(tmp_path, engine)
    for index in SPILLED:
        spill.put(index, values(index, 0))
    spill.settle()
    if how == "unreadable":
        engine.pread = failing(errno.EIO)
    else:
        os.truncate(tmp_path / "gradients0.bin", 4096)
    last = next(shard for shard in shards_of() if shard.block == 3)
    arena = HostArena(spill.beside_nbytes(last), tier="test")
    read = spill.read(last, SPILLED, arena.view(0, arena.nbytes))
    assert read is not None
    with pytest.raises(DiskError, match=r"gradient of fourth \(block 3\).*offset \d+ of .*gradients0\.bin"):
        read.wait()
    with pytest.raises(DiskError, match=r"gradient of third \(block 2\).*host memory"):
        spill.get(2)
    spill.close()


def test_a_short_write_is_finished(tmp_path: Path) -> None:
    engine = DiskEngine(pwrite=lambda fd, buffers, offset: os.pwritev(fd, [buffers[0][:4096]], offset))
    spill = make(tmp_path, engine, most=4096)
    spill.put(2, values(2, 0, torch.float32))
    assert torch.equal(spill.get(2), values(2, 0, torch.float32))
    spill.close()
    engine.close()


def test_a_drive_that_is_too_small_is_met_before_training(
    tmp_path: Path, engine: DiskEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFitError, match=r"gradients.*disk=…") as caught:
        make(tmp_path, engine)
    assert caught.value.tier == "disk"


def test_all_room_is_taken_at_once(tmp_path: Path, engine: DiskEngine) -> None:
    spill = make(tmp_path, engine)
    status = (tmp_path / "gradients0.bin").stat()
    assert status.st_size >= 4 * sum(SIZES[index] for index in SPILLED)
    assert status.st_blocks * 512 >= status.st_size
    before = status.st_blocks
    for index in SPILLED:
        spill.put(index, values(index, 0, torch.float32))
    spill.settle()
    assert (tmp_path / "gradients0.bin").stat().st_blocks == before
    spill.close()


def hanging(go_on: threading.Event, plain: Callable[..., int]) -> Callable[..., int]:
    def hang(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert go_on.wait(20)
        return plain(fd, buffers, offset)

    return hang


def test_a_write_that_hangs_is_reported_by_all_who_wait_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    engine = DiskEngine(pwrite=hanging(go_on, os.pwritev))
    spill = make(tmp_path, engine, watch_s=0.05, stall_s=0.1)
    spill.put(0, values(0, 0))
    waits: list[tuple[Callable[[], object], str]] = [
        (spill.settle, "the end of a step waits for gradients to be on disk"),
        (spill.forget, "gradients that are not wanted any more wait for their writes"),
        (lambda: spill._await_written(0), r"the gradient of first \(block 1\) waits for its own write"),
        (lambda: [spill._take(2) for _ in range(5)], r"the gradient of third \(block 2\) waits for a buffer"),
    ]
    for wait, what in waits:
        caplog.clear()
        report = rf"{what}; \d of 4 buffers are free, gradients being written to .*0\.bin: first; nothing moved"
        with pytest.raises(StallError, match=rf"gave up: {report} for .*Is the drive still there"):
            wait()
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    go_on.set()
    engine.close()


def test_a_read_that_hangs_is_reported(tmp_path: Path) -> None:
    go_on = threading.Event()
    engine = DiskEngine(pread=hanging(go_on, os.preadv))
    spill = make(tmp_path, engine, watch_s=0.05, stall_s=0.1)
    spill.put(0, values(0, 0))
    spill.settle()
    first = next(shard for shard in shards_of() if shard.block == 1)
    arena = HostArena(spill.beside_nbytes(first), tier="test")
    read = spill.read(first, SPILLED, arena.view(0, arena.nbytes))
    assert read is not None
    with pytest.raises(StallError, match=r"an update waits for the gradient of first \(block 1\) to be read back"):
        read.wait()
    with pytest.raises(StallError, match=r"backward waits for the gradient of first \(block 1\) to be read back"):
        spill.get(0)
    go_on.set()
    read.wait()
    engine.close()


def test_a_slow_drive_is_waited_for(tmp_path: Path) -> None:
    """Each write takes longer than a report comes, all of them longer than anything may stand still."""

    def pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.05)
        return os.pwritev(fd, buffers, offset)

    engine = DiskEngine(threads=1, pwrite=pwrite)
    spill = make(tmp_path, engine, watch_s=0.02, stall_s=0.25)
    spill.put(2, values(2, 0))
    spill.settle()
    assert torch.equal(spill.get(2), values(2, 0))
    spill.close()
    engine.close()
