"""Shards through the pipeline: what is written is what the next work on them finds, however slow the drive."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DiskError, PenstockError, StallError, StoreError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.pipeline import BUFFERS, ShardPipeline
from penstock.runtime.training.shards import Shard, cut_shards

ARRAYS = 3


@pytest.fixture
def shards() -> tuple[Shard, ...]:
    return cut_shards([1500, 700, 5000], {1: [0, 1], 2: [2]}, most=1024)


def make(folder: Path, shards: Sequence[Shard], engine: DiskEngine, **watch: float) -> tuple[ShardPipeline, BlockStore]:
    specs = [
        BlockSpec(name=f"shard {shard.id}", kind="optimizer", nbytes=ARRAYS * shard.array_nbytes) for shard in shards
    ]
    store = BlockStore.create(folder / "states", specs, identity="test")
    return ShardPipeline(store=store, engine=engine, shards=shards, arrays=ARRAYS, **watch), store


def each(numbers: Iterator[int]):
    return lambda: next(numbers, None)


def slow_pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    time.sleep(0.02)
    return os.pwritev(fd, buffers, offset)


def test_work_finds_what_the_last_work_left_though_its_write_is_under_way(
    tmp_path: Path, shards: tuple[Shard, ...]
) -> None:
    engine = DiskEngine(pwrite=slow_pwrite)
    pipeline, store = make(tmp_path, shards, engine)

    def fill(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        for index, array in enumerate(arrays):
            assert not array.any()
            array.fill_(100 * shard.id + index)

    def add(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        for array in arrays:
            array += 1

    def look(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        for index, array in enumerate(arrays):
            assert torch.equal(array, torch.full_like(array, 100 * shard.id + index + 5)), shard

    with store:
        pipeline.run(each(iter(range(len(shards)))), fill, new=True)
        again = [number for _ in range(5) for number in range(len(shards))]  # back to back, in one run
        pipeline.run(each(iter(again)), add)
        pipeline.run(each(iter(range(len(shards)))), look, write=False)
        pipeline.close()
        engine.close()


def test_a_shard_that_comes_back_as_soon_as_it_has_been_changed(tmp_path: Path, shards: tuple[Shard, ...]) -> None:
    engine = DiskEngine(pwrite=slow_pwrite)
    pipeline, store = make(tmp_path, shards, engine)
    seen: list[float] = []
    given: list[int] = []

    def take() -> int | None:
        if len(given) == 1 + 2 * BUFFERS or len(given) > len(seen):
            return None
        given.append(0)
        return 0

    def count(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        seen.append(float(arrays[0][0]))
        arrays[0] += 1

    with store:
        pipeline.run(each(iter([0])), lambda shard, arrays: None, new=True)
        pipeline.run(take, count)
        pipeline.close()
        engine.close()
    assert seen == [float(i) for i in range(1 + 2 * BUFFERS)]


class Apart:
    """Adds to some shards, no sooner than when they are waited for."""

    at_once = 3

    def __init__(self, numbers: set[int], alone: set[int]) -> None:
        self.numbers, self.alone = numbers, alone
        self.seen: list[str] = []

    def takes(self, shard: Shard) -> bool:
        return shard.id in self.numbers

    def waits(self, shard: Shard) -> bool:
        return shard.id in self.alone

    def begin(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> Callable[[], None]:
        self.seen.append(f"send {shard.id}")

        def finish() -> None:
            self.seen.append(f"end {shard.id}")
            for array in arrays:
                array += 1

        return finish

    def work(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        self.seen.append(f"work {shard.id}")
        for array in arrays:
            array += 1


@pytest.mark.parametrize(
    ("numbers", "alone", "order"),
    [
        ({0}, set(), "send 0, work 1, work 2, work 3, end 0, work 4, work 5, work 6, work 7"),
        ({0}, {3}, "send 0, work 1, work 2, end 0, work 3, work 4, work 5, work 6, work 7"),
        ({3}, set(), "work 0, work 1, work 2, send 3, work 4, work 5, work 6, work 7, end 3"),
        (
            {0, 1, 2, 4},
            set(),
            "send 0, send 1, send 2, work 3, end 0, send 4, end 1, work 5, end 2, work 6, work 7, end 4",
        ),
    ],
)
def test_what_is_worked_on_elsewhere_ends_before_its_place_is_needed_or_its_block_waits_for_long(
    tmp_path: Path, shards: tuple[Shard, ...], numbers: set[int], alone: set[int], order: str
) -> None:
    """The first three shards are a block, the other five another one."""
    engine = DiskEngine(pwrite=slow_pwrite)
    pipeline, store = make(tmp_path, shards, engine)
    apart = Apart(numbers, alone)

    def look(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        assert all(torch.equal(array, torch.full_like(array, 2)) for array in arrays), shard

    with store:
        pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)
        for _ in range(2):
            apart.seen.clear()
            pipeline.run(each(iter(range(len(shards)))), apart.work, elsewhere=apart)
            assert ", ".join(apart.seen) == order
        pipeline.run(each(iter(range(len(shards)))), look, write=False)
        pipeline.close()
        engine.close()


def test_a_write_that_fails_is_told_and_the_buffers_come_back(tmp_path: Path, shards: tuple[Shard, ...]) -> None:
    fails: list[bool] = []

    def pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fails:
            raise OSError(28, "no space")
        return os.pwritev(fd, buffers, offset)

    engine = DiskEngine(pwrite=pwrite)
    pipeline, store = make(tmp_path, shards, engine)
    pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)
    fails.append(True)
    with pytest.raises(PenstockError, match=r"full|space"):
        pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None)
    pipeline.close()
    engine.close()
    store.close()


@pytest.mark.parametrize("operation", ["pread", "pwrite"])
def test_a_drive_that_does_not_answer_is_reported_and_given_up(
    operation: str, tmp_path: Path, shards: tuple[Shard, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """And what it may still write into is not given back before it has answered."""
    answers = threading.Event()
    answers.set()

    def slow(plain: Callable[..., int]) -> Callable[[int, Sequence[memoryview], int], int]:
        def transfer(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            assert answers.wait(20)
            return plain(fd, buffers, offset)

        return transfer

    engine = DiskEngine(**{operation: slow(os.preadv if operation == "pread" else os.pwritev)})
    pipeline, store = make(tmp_path, shards, engine, watch_s=0.05, stall_s=0.2)
    pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)
    answers.clear()
    caplog.set_level(logging.WARNING)
    with pytest.raises(StallError, match=r"gave up: .*; nothing moved for .*Is the drive still there"):
        pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None)
    what = "waits for shard 0 to be read" if operation == "pread" else "shards being written to"
    assert any(what in record.getMessage() for record in caplog.records)
    assert len(pipeline._free) < BUFFERS
    answers.set()
    engine.close()
    assert len(pipeline._free) == BUFFERS
    pipeline.close()
    store.close()


def test_a_slow_drive_is_waited_for(tmp_path: Path, shards: tuple[Shard, ...]) -> None:
    """Each write takes longer than a report comes, all of them longer than anything may stand still."""

    def pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.06)
        return os.pwritev(fd, buffers, offset)

    engine = DiskEngine(threads=1, pwrite=pwrite)
    pipeline, store = make(tmp_path, shards, engine, watch_s=0.02, stall_s=0.3)
    with store:
        pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)
        pipeline.close()
        engine.close()


def test_writes_that_were_called_off_did_not_arrive(tmp_path: Path, shards: tuple[Shard, ...]) -> None:
    """The engine was closed before it had begun them: a commit must not take them for written."""
    begun, closes = threading.Event(), threading.Event()

    def pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if begun.is_set():
            assert closes.wait(20)
        return os.pwritev(fd, buffers, offset)

    engine = DiskEngine(threads=1, pwrite=pwrite)
    pipeline, store = make(tmp_path, shards, engine)
    pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)
    store.commit(b"first").wait()
    begun.set()

    def close_engine() -> None:
        time.sleep(0.05)
        closer = threading.Thread(target=engine.close)
        closer.start()
        time.sleep(0.05)
        closes.set()
        closer.join()

    def work(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        arrays[0].fill_(7)

    closing = threading.Thread(target=close_engine)
    closing.start()
    with pytest.raises(PenstockError):
        pipeline.run(each(iter(range(len(shards)))), work)
    closing.join()
    with pytest.raises(PenstockError):
        store.commit(b"second").wait()
    pipeline.close()
    store.close()
    with BlockStore.open(tmp_path / "states") as again:
        assert again.metadata == b"first"
        for number in range(len(shards)):
            again.read(number)


def test_a_write_that_cannot_begin_stops_the_store(
    tmp_path: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DiskEngine()
    pipeline, store = make(tmp_path, shards, engine)
    pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None, new=True)

    def refuse(*_: object) -> None:
        raise DiskError("too many open files")

    monkeypatch.setattr(engine, "write", refuse)
    with pytest.raises(DiskError, match="too many"):
        pipeline.run(each(iter(range(len(shards)))), lambda shard, arrays: None)
    with pytest.raises(StoreError, match="too many"):
        store.commit(b"")
    pipeline.close()
    engine.close()
    store.close()
