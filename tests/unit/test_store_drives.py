"""The block store and its drives: several of them, a full one, what is written to them, and by whom."""

import random
import threading
from pathlib import Path

import pytest

from penstock.memory.arena import PAGE, HostArena, round_up
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DoesNotFitError, StoreError
from penstock.memory.store import BlockSpec, BlockStore, checksum

WAIT_S = 20.0
SIZES = (100, PAGE, PAGE + 1, 3 * PAGE - 5)
SPECS = [BlockSpec(name=f"layer.{i}", kind="optimizer", nbytes=nbytes) for i, nbytes in enumerate(SIZES)]


def payload(block: int, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(SIZES[block])


def test_blocks_are_spread_over_drives_and_found_from_the_home_folder(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    specs = [BlockSpec(name=str(i), kind="", nbytes=PAGE * (1 + i % 5)) for i in range(30)]
    with BlockStore.create(folders, specs, identity="") as store:
        for block, spec in enumerate(specs):
            store.write(block, bytes([block]) * spec.nbytes)
        store.commit(b"").wait(WAIT_S)
    sizes = [(folder / "blocks.data").stat().st_size for folder in folders]
    assert sum(sizes) == 2 * sum(spec.nbytes for spec in specs)
    assert max(sizes) - min(sizes) <= 2 * 5 * PAGE
    with BlockStore.open(folders[0]) as store:  # the others are where they were
        assert store.folders == tuple(folder.resolve() for folder in folders)
        assert [store.read(b) for b in range(30)] == [bytes([b]) * spec.nbytes for b, spec in enumerate(specs)]
    moved = folders[2].rename(tmp_path / "moved")
    with pytest.raises(StoreError, match=r"does not exist.*part 2 of the store in .*a: name all its folders"):
        BlockStore.open(folders[0])
    with BlockStore.open([moved, folders[0]]) as store:  # in any order
        assert store.folders[2] == moved.resolve()
        store.commit(b"").wait(WAIT_S)
    with BlockStore.open(folders[0]) as store:  # the commit noted the move
        assert store.folders[2] == moved.resolve()
    with pytest.raises(StoreError, match=r"part 1 of a store; its home folder.* was .*a: name that"):
        BlockStore.open(folders[1])


def test_a_full_disk_is_met_when_the_store_is_made(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"needs \d+\.\d\d GiB for .*blocks\.data.*two slots.*--disk") as caught:
        BlockStore.create(tmp_path / "run", [BlockSpec(name="", kind="", nbytes=2**55)], identity="")
    assert caught.value.tier == "disk"
    assert caught.value.needed_nbytes == 2**56
    assert caught.value.available_nbytes < 2**50
    assert list(tmp_path.iterdir()) == []


def test_bytes_written_are_counted_over_runs(tmp_path: Path) -> None:
    pages = [round_up(nbytes) for nbytes in SIZES]
    manifest = 2 * PAGE
    with BlockStore.create(tmp_path / "run", SPECS, identity="") as store:
        assert store.statistics().written_nbytes == manifest
        store.write(0, payload(0, 1))
        store.write(3, payload(3, 1))
        store.commit(b"").wait(WAIT_S)
        assert store.statistics().written_nbytes == pages[0] + pages[3] + 2 * manifest
        store.write(1, payload(1, 1))  # lost: not committed
    with BlockStore.open(tmp_path / "run") as store:
        store.write(3, payload(3, 1))
        store.commit(b"").wait(WAIT_S)
        assert store.statistics().written_nbytes == pages[0] + 2 * pages[3] + 3 * manifest


def test_many_threads_write_through_the_disk_engine(tmp_path: Path) -> None:
    """As training does it: blocks are read, changed and written by several threads while commits are published."""
    count, rounds, nbytes = 12, 6, 5 * PAGE + 77
    specs = [BlockSpec(name=str(i), kind="", nbytes=nbytes) for i in range(count)]
    arena = HostArena(count * round_up(nbytes))
    slots = [arena.cut(nbytes) for _ in specs]
    engine = DiskEngine(threads=2, chunk_nbytes=2 * PAGE)
    failures: list[Exception] = []

    def work(store: BlockStore, blocks: range, number: int) -> None:
        try:
            for block in blocks:
                view = arena.view(slots[block].offset, round_up(nbytes))
                view[:nbytes] = random.Random(f"{number} {block}").randbytes(nbytes)
                span = store.begin_write(block)
                assert span is not None
                engine.write(span.path, span.offset, view).wait(WAIT_S)
                store.written(block, checksum(view[:nbytes]))
        except Exception as error:
            failures.append(error)

    with BlockStore.create([tmp_path / "a", tmp_path / "b"], specs, identity="") as store:
        for number in range(rounds):
            threads = [threading.Thread(target=work, args=(store, range(i, count, 3), number)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_S)
            store.commit(b"%d" % number)
        assert store.drain(WAIT_S)
        engine.close()
    assert failures == []
    with BlockStore.open(tmp_path / "a") as store:
        assert store.metadata == b"%d" % (rounds - 1)
        for block in range(count):
            assert store.read(block) == random.Random(f"{rounds - 1} {block}").randbytes(nbytes)
    arena.close()
