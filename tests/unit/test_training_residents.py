"""Shards that stay in memory: steps move nothing, and a commit has them as they were when it was cut."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import CorruptBlockError, PenstockError, StallError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.pipeline import ShardPipeline, arrays_of
from penstock.runtime.training.shards import Shard, cut_shards

ARRAYS = 3
SHARDS = cut_shards([1500, 700, 5000], {1: [0, 1], 2: [2]}, most=1024)
ALL = range(len(SHARDS))


def each(numbers: Sequence[int]) -> Callable[[], int | None]:
    left = iter(numbers)
    return lambda: next(left, None)


def create(folder: Path) -> BlockStore:
    specs = [
        BlockSpec(name=f"shard {shard.id}", kind="optimizer", nbytes=ARRAYS * shard.array_nbytes) for shard in SHARDS
    ]
    return BlockStore.create(folder / "states", specs, identity="test")


def pipeline_of(store: BlockStore, engine: DiskEngine, kept: Sequence[int], **watch: float) -> ShardPipeline:
    return ShardPipeline(store=store, engine=engine, shards=SHARDS, arrays=ARRAYS, kept=kept, **watch)


def fill(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
    for index, array in enumerate(arrays):
        assert not array.any()
        array.fill_(100 * shard.id + index)


def add(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
    for array in arrays:
        array += 1


def expect(value: int) -> Callable[[Shard, Sequence[torch.Tensor]], None]:
    """See that `fill` and so many times `add` came by."""

    def look(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        for index, array in enumerate(arrays):
            assert torch.equal(array, torch.full_like(array, 100 * shard.id + index + value)), shard

    return look


def committed(folder: Path) -> dict[int, int]:
    """How many times `add` had come by each shard in the last commit."""
    found = {}
    with BlockStore.open(folder / "states", readonly=True) as store:
        for shard in SHARDS:
            raw = memoryview(bytearray(store.read(shard.id)))
            value = arrays_of(raw, shard, ARRAYS)[0]
            assert torch.equal(value, torch.full_like(value, value[0].item()))
            found[shard.id] = int(value[0]) - 100 * shard.id
    return found


def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    time.sleep(0.01)
    return os.pwritev(fd, buffers, offset)


@pytest.fixture
def engine() -> Iterator[DiskEngine]:
    made = DiskEngine(pwrite=slow)
    yield made
    made.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(kept=st.sets(st.sampled_from(list(ALL))), moves=st.lists(st.sampled_from(["step", "commit"]), max_size=6))
def test_each_commit_has_the_state_of_its_moment(
    tmp_path_factory: pytest.TempPathFactory, engine: DiskEngine, kept: set[int], moves: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    steps, last, handle = 0, None, None
    with create(folder) as store:
        pipeline = pipeline_of(store, engine, sorted(kept))
        pipeline.run(each(ALL), fill, new=True)
        for move in moves:
            if move == "step":  # it may change what a commit is still writing, and must not until that is written
                pipeline.run(each(ALL), add)
                steps += 1
            else:
                pipeline.write_out()
                handle, last = store.commit(b""), steps
        pipeline.run(each(ALL), expect(steps), write=False)
        if handle is not None:
            handle.wait()
        pipeline.settle()
        pipeline.close()
    if last is not None:
        assert committed(folder) == dict.fromkeys(ALL, last)


def test_a_run_that_goes_on_keeps_others(tmp_path: Path, engine: DiskEngine) -> None:
    with create(tmp_path) as store:
        pipeline = pipeline_of(store, engine, [0, 2, 4])
        pipeline.run(each(ALL), fill, new=True)
        pipeline.write_out()
        store.commit(b"").wait()
        pipeline.close()
    with BlockStore.open(tmp_path / "states") as store:
        pipeline = pipeline_of(store, engine, [1, 2, 3])
        pipeline.run(each(ALL), expect(0), write=False)
        for _ in range(3):
            pipeline.run(each(ALL), add)
        pipeline.run(each(ALL), expect(3), write=False)
        pipeline.write_out()
        store.commit(b"").wait()
        pipeline.close()
    assert committed(tmp_path) == dict.fromkeys(ALL, 3)


def test_what_stays_is_read_once_and_checked(tmp_path: Path, engine: DiskEngine) -> None:
    with create(tmp_path) as store:
        pipeline = pipeline_of(store, engine, [])
        pipeline.run(each(ALL), fill, new=True)
        store.commit(b"").wait()
        pipeline.close()
        pipeline = pipeline_of(store, engine, list(ALL))
        before = engine.statistics()
        for value in range(3):
            pipeline.run(each(ALL), expect(value), write=False)
            pipeline.run(each(ALL), add)
        after = engine.statistics()
        assert after.read_nbytes - before.read_nbytes == sum(ARRAYS * shard.array_nbytes for shard in SHARDS)
        assert after.written_nbytes == before.written_nbytes
        pipeline.close()
        damaged = store.location(2)
        with open(damaged.path, "r+b") as file:
            file.seek(damaged.offset + 10)
            file.write(b"\xff")
        pipeline = pipeline_of(store, engine, list(ALL))
        with pytest.raises(CorruptBlockError):
            pipeline.run(each(ALL), expect(0), write=False)
        pipeline.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_commit_that_cannot_be_written_fails_and_the_last_one_stays(number: int, tmp_path: Path) -> None:
    engine = DiskEngine()
    with create(tmp_path) as store:
        pipeline = pipeline_of(store, engine, list(ALL))
        pipeline.run(each(ALL), fill, new=True)
        pipeline.write_out()
        store.commit(b"").wait()
        pipeline.run(each(ALL), add)
        written: list[int] = []

        def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if len(written) == 3:
                raise OSError(number, os.strerror(number))
            written.append(offset)
            return os.pwritev(fd, buffers, offset)

        engine.pwrite = fail
        pipeline.write_out()
        with pytest.raises(PenstockError, match=r"offset \d+ of .*blocks\.data"):
            store.commit(b"").wait()  # which of the two depends on when the write has failed
        with pytest.raises(PenstockError):  # and no step goes on as if nothing had been
            pipeline.run(each(ALL), add)
        with pytest.raises(PenstockError):
            pipeline.write_out()
        pipeline.close()
        engine.close()
    assert committed(tmp_path) == dict.fromkeys(ALL, 0)


def test_a_commit_is_given_up_where_the_drive_is_stopped_before(tmp_path: Path) -> None:
    """Not published with what never arrived."""
    engine = DiskEngine(threads=1)
    store = create(tmp_path)
    pipeline = pipeline_of(store, engine, list(ALL))
    pipeline.run(each(ALL), fill, new=True)
    pipeline.write_out()
    store.commit(b"").wait()
    pipeline.run(each(ALL), add)
    begun, go_on = threading.Event(), threading.Event()

    def hang(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        begun.set()
        go_on.wait()
        return os.pwritev(fd, buffers, offset)

    engine.pwrite = hang
    pipeline.write_out()
    handle = store.commit(b"")
    assert begun.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.001)
    go_on.set()
    closing.join()
    pipeline.close()
    store.close()
    assert handle.error is not None
    assert committed(tmp_path) == dict.fromkeys(ALL, 0)


class Gate:
    """A drive that writes one shard whenever it is let to."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.written = 0
        """Shards whose writes are over."""
        self.open = False

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self.open:
            assert self.permits.acquire(timeout=20)
        count = os.pwritev(fd, buffers, offset)
        self.written += 1
        return count


@pytest.mark.parametrize("order", ["of shards", "backward", "another one"])
def test_an_update_waits_for_the_write_of_its_own_shard_and_not_for_the_whole_commit(
    order: str, tmp_path: Path
) -> None:
    gate = Gate()
    gate.open = True
    engine = DiskEngine(pwrite=gate.pwrite)
    shards = cut_shards([20 * 1024], {1: [0]}, most=1024)
    specs = [BlockSpec(name=f"shard {each.id}", kind="optimizer", nbytes=ARRAYS * each.array_nbytes) for each in shards]
    numbers = list(range(len(shards)))
    before = numbers if order != "backward" else numbers[::-1]
    after = before if order != "another one" else numbers[::-1]
    with BlockStore.create(tmp_path / "states", specs, identity="test") as store:
        pipeline = ShardPipeline(store=store, engine=engine, shards=shards, arrays=ARRAYS, kept=numbers)
        pipeline.run(each(numbers), fill, new=True)
        pipeline.write_out()
        store.commit(b"").wait()
        pipeline.run(each(before), add)
        gate.open, gate.written = False, 0
        pipeline.write_out()
        handle = store.commit(b"")
        landed: list[int] = []
        changed = threading.Event()

        def work(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
            landed.append(gate.written)
            changed.set()
            add(shard, arrays)

        updating = threading.Thread(target=pipeline.run, args=(each(after), work))
        updating.start()
        while updating.is_alive() or gate.written < len(numbers):
            gate.permits.release()
            changed.wait(0.2)  # let the update take up what has been written
            changed.clear()
        updating.join()
        # Three are under way at a time, which may be others, and three more when an update comes to take up its own.
        assert landed[0] <= 1 + 2 * 3
        if order != "another one":  # else a place that gets free goes to whatever is next, if an update lags behind
            assert all(count <= place + 1 + 2 * 3 for place, count in enumerate(landed))
        handle.wait()
        pipeline.run(each(numbers), expect(2), write=False)
        pipeline.settle()
        pipeline.close()
    engine.close()


def test_a_commit_that_is_not_written_is_reported_and_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By who wants to write the next one; what the drive may still read is not given back."""
    gate = Gate()
    gate.open = True
    engine = DiskEngine(pwrite=gate.pwrite)
    store = create(tmp_path)
    pipeline = pipeline_of(store, engine, list(ALL), watch_s=0.05, stall_s=0.2)
    pipeline.run(each(ALL), fill, new=True)
    pipeline.write_out()
    store.commit(b"").wait()
    pipeline.run(each(ALL), add)
    gate.open = False
    pipeline.write_out()
    with pytest.raises(StallError, match=r"gave up: \d+ shards of a commit wait to be written; shards being"):
        pipeline._residents.join()
    assert any("shards of a commit wait" in record.getMessage() for record in caplog.records)
    with pytest.raises(StallError, match="waits for its own write"):
        pipeline.run(each([len(SHARDS) - 1]), add)
    pipeline._residents.close()
    assert pipeline._residents.view(SHARDS[0])  # still there
    gate.open = True
    for _ in ALL:
        gate.permits.release()
    pipeline.settle()
    pipeline.close()
    engine.close()
    store.close()
