"""Looking at a store from outside: verify, stats, prune."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock.memory.arena import PAGE, round_up
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import StoreBusyError, StoreError
from penstock.memory.store import BlockSpec, BlockStore, prune, stats, verify

WAIT_S = 20.0
SIZES = (100, 3 * PAGE, 5 * PAGE + 1, 40 * 2**20 + 5)
"""The last is longer than the pieces that verify reads."""
SPECS = [BlockSpec(name=f"b{i}", kind="weights" if i else "optimizer", nbytes=n) for i, n in enumerate(SIZES)]


def payload(block: int, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(1000) * (SIZES[block] // 1000) + bytes(SIZES[block] % 1000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two commits; the second wrote blocks 1 and 2 only."""
    with BlockStore.create(tmp_path / "run", SPECS, identity="tiny") as store:
        for block in range(4):
            store.write(block, payload(block, 1))
        store.commit(b"one").wait(WAIT_S)
        for block in (1, 2):
            store.write(block, payload(block, 2))
        store.commit(b"two").wait(WAIT_S)
    return tmp_path / "run"


def flip(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_verify_reads_all_and_finds_nothing(run: Path) -> None:
    seen: list[int] = []
    report = verify(run, on_block=seen.append)
    assert report.good
    assert (report.commit, report.blocks, report.nbytes) == (2, 4, sum(SIZES))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(("block", "at"), [(0, 0), (0, 99), (1, PAGE), (3, 0), (3, 17 * 2**20), (3, SIZES[3] - 1)])
def test_verify_names_the_block_that_changed(run: Path, block: int, at: int) -> None:
    with BlockStore.open(run, readonly=True) as store:
        span = store.location(block)
    flip(span.path, span.offset + at)
    report = verify(run)
    assert not report.good
    (bad,) = report.bad
    assert (bad.block, bad.name, bad.path, bad.offset, bad.nbytes) == (
        block,
        f"b{block}",
        span.path,
        span.offset,
        SIZES[block],
    )
    assert bad.found_checksum not in (None, bad.expected_checksum)
    assert f"{bad.expected_checksum:016x}" in bad.reason


def test_what_lies_beside_the_payload_or_in_the_other_slot_does_not_matter(run: Path) -> None:
    with BlockStore.open(run, readonly=True) as store:
        span = store.location(0)
        other = store.location(1)
    flip(span.path, span.offset + SIZES[0])
    base = store._facts.slotmap.homes[1].offset
    unused = base if other.offset != base else base + round_up(SIZES[1])
    flip(span.path, unused)
    assert verify(run).good


def test_verify_goes_on_where_a_block_cannot_be_read(run: Path) -> None:
    with BlockStore.open(run, readonly=True) as store:
        span = store.location(1)

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == span.offset:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    engine = DiskEngine(threads=1, pread=pread)
    report = verify(run, engine=engine)
    engine.close()
    (bad,) = report.bad
    assert (bad.block, bad.found_checksum) == (1, None)
    assert f"offset {span.offset} of {span.path}: Input/output error" in bad.reason


def test_verify_of_a_store_that_is_being_written(run: Path) -> None:
    """Blocks that are written again while they are read are read again, by the newer manifest."""
    with BlockStore.open(run) as store:
        commits = 0

        def overtake(block: int) -> None:
            nonlocal commits
            if block == 0 and commits == 0:  # blocks 1 and 2 are still to be read, in slots that are freed now
                for version in (3, 4):
                    for number in (1, 2):
                        store.write(number, payload(number, version))
                    assert store.commit(b"").wait(WAIT_S)
                    commits += 1

        report = verify(run, on_block=overtake)
        assert report.good
        assert (report.commit, commits) == (4, 2)


def test_stats(run: Path) -> None:
    found = stats(run)
    slots = sum(round_up(nbytes) for nbytes in SIZES)
    assert (found.commit, found.metadata, found.identity) == (2, b"two", "tiny")
    assert (found.blocks, found.committed_blocks, found.changed_blocks, found.slots) == (4, 4, 2, 8)
    assert found.payload_nbytes == sum(SIZES)
    assert found.nbytes_by_kind == {"optimizer": 100, "weights": sum(SIZES[1:])}
    assert found.file_nbytes == 2 * slots
    assert found.allocated_nbytes >= 2 * slots
    assert found.written_nbytes == slots + round_up(SIZES[1]) + round_up(SIZES[2]) + 3 * found.manifest_nbytes
    with BlockStore.open(run) as store:
        store.write(0, payload(0, 3))
        assert stats(run) == found, "of the last commit, also while the store is open"


def test_prune_gives_back_every_unused_slot_and_the_run_goes_on(run: Path) -> None:
    (run / "manifest.new").write_bytes(b"torn")
    (run / "notes.txt").write_text("mine")
    before = stats(run)
    report = prune(run)
    half = sum(round_up(nbytes) for nbytes in SIZES)
    assert (report.commit, report.slots, report.freed_nbytes) == (2, 4, half)
    assert {Path(path).name for path in report.removed} == {"manifest.new", "manifest.previous"}
    assert sorted(os.listdir(run)) == ["blocks.data", "manifest", "notes.txt", "penstock-store"]
    assert stats(run).allocated_nbytes == before.allocated_nbytes - half
    assert verify(run).good
    assert prune(run).freed_nbytes == 0
    with BlockStore.open(run) as store:
        assert stats(run).allocated_nbytes >= before.allocated_nbytes, "taken again, so that a full disk is met now"
        for block in range(4):
            assert store.read(block) == payload(block, 2 if block in (1, 2) else 1)
            store.write(block, payload(block, 3))
        assert store.commit(b"three").wait(WAIT_S)
    assert verify(run).good


def test_prune_of_an_empty_store_takes_everything_back(tmp_path: Path) -> None:
    BlockStore.create(tmp_path / "run", SPECS, identity="").close()
    assert prune(tmp_path / "run").slots == 8
    assert stats(tmp_path / "run").allocated_nbytes == 0


def test_prune_leaves_a_store_alone_that_is_in_use(run: Path) -> None:
    with BlockStore.open(run), pytest.raises(StoreBusyError):
        prune(run)
    prune(run)


@pytest.mark.parametrize("tool", [verify, stats, prune])
def test_a_folder_without_a_store(tmp_path: Path, tool: object) -> None:
    assert callable(tool)
    with pytest.raises(StoreError, match=r"has no block store in it: name the folder"):
        tool(tmp_path)
    with pytest.raises(StoreError, match=r"nowhere does not exist"):
        tool(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file is not a folder"):
        tool(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file"]
