"""Shards through the pipeline: what is written is what the next work on them finds, however slow the drive."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import PenstockError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.pipeline import BUFFERS, ShardPipeline
from penstock.runtime.training.shards import Shard, cut_shards

ARRAYS = 3


@pytest.fixture
def shards() -> tuple[Shard, ...]:
    return cut_shards([1500, 700, 5000], {1: [0, 1], 2: [2]}, most=1024)


def make(folder: Path, shards: Sequence[Shard], engine: DiskEngine) -> tuple[ShardPipeline, BlockStore]:
    specs = [
        BlockSpec(name=f"shard {shard.id}", kind="optimizer", nbytes=ARRAYS * shard.array_nbytes) for shard in shards
    ]
    store = BlockStore.create(folder / "states", specs, identity="test")
    return ShardPipeline(store=store, engine=engine, shards=shards, arrays=ARRAYS), store


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
