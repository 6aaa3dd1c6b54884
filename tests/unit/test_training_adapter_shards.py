"""Shards that stay in memory: what a commit has is what they were then, whatever happens to them afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import CorruptBlockError, DiskError, StoreError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.adaptershards import AdapterShards
from penstock.runtime.training.shards import Shard, cut_shards

ARRAYS = 3
SHARDS = cut_shards([1500, 700, 5000], {0: [0, 1, 2]}, most=1024)


def specs() -> list[BlockSpec]:
    return [BlockSpec(name=f"shard {s.id}", kind="optimizer", nbytes=ARRAYS * s.array_nbytes) for s in SHARDS]


def over(store: BlockStore, engine: DiskEngine) -> AdapterShards:
    return AdapterShards(store=store, engine=engine, shards=SHARDS, arrays=ARRAYS)


def each(numbers: Sequence[int]) -> Callable[[], int | None]:
    left = iter(numbers)
    return lambda: next(left, None)


ALL = range(len(SHARDS))


def start(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
    for index, array in enumerate(arrays):
        assert not array.any()
        array.fill_(100 * shard.id + index)


def values(pipeline: AdapterShards) -> list[float]:
    """The first number of each array, the others being equal."""
    found: list[float] = []

    def look(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        for array in arrays:
            assert torch.equal(array, array[:1].expand(len(array)))
            found.append(array[0].item())

    pipeline.run(each(ALL), look, write=False)
    return found


def test_a_step_moves_nothing_and_a_commit_what_has_changed(tmp_path: Path) -> None:
    engine = DiskEngine()
    store = BlockStore.create(tmp_path / "states", specs(), identity="test")
    pipeline = over(store, engine)
    pipeline.run(each(ALL), start, new=True)
    pipeline.run(each(ALL), lambda shard, arrays: arrays[1].add_(1))
    assert engine.statistics().written_nbytes == 0
    pipeline.write_out()
    whole = sum(ARRAYS * shard.array_nbytes for shard in SHARDS)
    assert engine.statistics().written_nbytes == whole
    store.commit(b"first").wait()
    pipeline.run(each([2, 2]), lambda shard, arrays: arrays[0].add_(1))
    pipeline.write_out()
    pipeline.write_out()  # nothing is left
    assert engine.statistics().written_nbytes == whole + ARRAYS * SHARDS[2].array_nbytes
    assert engine.statistics().read_nbytes == 0
    store.close()  # without a commit
    pipeline.close()

    with BlockStore.open(tmp_path / "states") as again:
        later = over(again, engine)
        expected = [100.0 * shard.id + index + (index == 1) for shard in SHARDS for index in range(ARRAYS)]
        assert values(later) == expected
        assert values(later) == expected
        assert engine.statistics().read_nbytes == whole  # once
        later.close()
    engine.close()


@settings(max_examples=15)
@given(st.lists(st.one_of(st.integers(0, len(SHARDS) - 1), st.sampled_from(["commit", "open"])), max_size=25))
def test_what_is_found_is_what_the_last_commit_saw(actions: list[int | str]) -> None:
    """Against a list of numbers: changes, commits, and ends without one, in any order."""
    engine = DiskEngine()
    with TemporaryDirectory() as folder:
        store = BlockStore.create(Path(folder) / "states", specs(), identity="test")
        pipeline = over(store, engine)
        pipeline.run(each(ALL), start, new=True)
        pipeline.write_out()
        store.commit(b"").wait()
        now = values(pipeline)
        committed = list(now)
        for action in actions:
            if action == "commit":
                pipeline.write_out()
                store.commit(b"").wait()
                committed = list(now)
            elif action == "open":
                store.close()
                pipeline.close()
                store = BlockStore.open(Path(folder) / "states")
                pipeline, now = over(store, engine), list(committed)
            else:
                assert isinstance(action, int)
                pipeline.run(each([action]), lambda shard, arrays: [array.add_(1) for array in arrays] and None)
                for index in range(ARRAYS):
                    now[action * ARRAYS + index] += 1
            assert values(pipeline) == now
        store.close()
        pipeline.close()
    engine.close()


def test_a_write_that_fails_leaves_the_last_commit(tmp_path: Path) -> None:
    fails: list[bool] = []

    def pwrite(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fails:
            raise OSError(28, "no space")
        return os.pwritev(fd, buffers, offset)

    engine = DiskEngine(pwrite=pwrite)
    store = BlockStore.create(tmp_path / "states", specs(), identity="test")
    pipeline = over(store, engine)
    pipeline.run(each(ALL), start, new=True)
    pipeline.write_out()
    store.commit(b"").wait()
    before = values(pipeline)
    pipeline.run(each(ALL), lambda shard, arrays: arrays[0].add_(1))
    fails.append(True)
    with pytest.raises(DiskError, match=r"blocks\.data.*full|space"):
        pipeline.write_out()
    with pytest.raises((StoreError, DiskError)):
        store.commit(b"")
    store.close()
    pipeline.close()
    fails.clear()
    with BlockStore.open(tmp_path / "states") as again:
        later = over(again, engine)
        assert values(later) == before
        later.close()
    engine.close()


def test_a_shard_that_was_damaged_is_not_taken(tmp_path: Path) -> None:
    engine = DiskEngine()
    store = BlockStore.create(tmp_path / "states", specs(), identity="test")
    pipeline = over(store, engine)
    pipeline.run(each(ALL), start, new=True)
    pipeline.write_out()
    store.commit(b"").wait()
    span = store.location(1)
    store.close()
    pipeline.close()
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 5)
        file.write(b"\x77")
    with BlockStore.open(tmp_path / "states") as again:
        later = over(again, engine)
        with pytest.raises(CorruptBlockError, match=r"blocks\.data"):
            values(later)
        later.close()
    engine.close()
