"""The block store as its callers use it: write, commit, reopen; what waits for what."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.memory.arena import PAGE, round_up
from penstock.memory.errors import (
    ClosedError,
    CorruptBlockError,
    StallError,
    StoreBusyError,
    StoreError,
    StoreIdentityError,
    UsageError,
)
from penstock.memory.store import BlockSpec, BlockStore, Commit, RunningChecksum, SystemFiles, checksum
from penstock.memory.store import commit as commit_module

WAIT_S = 20.0
SIZES = (100, PAGE, PAGE + 1, 3 * PAGE - 5)
SPECS = [BlockSpec(name=f"layer.{i}", kind="optimizer", nbytes=nbytes) for i, nbytes in enumerate(SIZES)]


def payload(block: int, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(SIZES[block])


class Gate(SystemFiles):
    """Publications stop before their fdatasync until the gate is opened."""

    def __init__(self) -> None:
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.waiting = threading.Event()

    def fdatasync(self, fd: int) -> None:
        self.waiting.set()
        assert self.open_gate.wait(WAIT_S)
        super().fdatasync(fd)

    def shut(self) -> None:
        self.waiting.clear()
        self.open_gate.clear()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def store(tmp_path: Path, gate: Gate) -> Iterator[BlockStore]:
    with BlockStore.create(tmp_path / "run", SPECS, identity="tiny", metadata=b"zero", files=gate) as made:
        yield made
        gate.open_gate.set()


def test_a_new_store_is_empty_and_has_taken_all_its_room(tmp_path: Path, store: BlockStore) -> None:
    assert (store.committed, store.metadata, store.identity) == (0, b"zero", "tiny")
    assert store.blocks == tuple(SPECS)
    assert store.folders == ((tmp_path / "run").resolve(),)
    data = (tmp_path / "run" / "blocks.data").stat()
    assert data.st_size == 2 * sum(round_up(nbytes) for nbytes in SIZES)
    assert data.st_blocks * 512 >= data.st_size
    assert data.st_mode & 0o777 == 0o600
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert not store.has_state(0)
    with pytest.raises(StoreError, match=r"block 1 \(optimizer 'layer\.1'\) was never written"):
        store.location(1)


def test_what_was_committed_is_there_after_reopening_and_nothing_else(tmp_path: Path, store: BlockStore) -> None:
    for block in range(3):
        store.write(block, payload(block, 1))
    assert store.commit(b"one").wait(WAIT_S)
    store.write(0, payload(0, 2))
    assert store.read(0) == payload(0, 2)
    store.close()
    with BlockStore.open(tmp_path / "run", identity="tiny") as again:
        assert (again.committed, again.metadata) == (1, b"one")
        assert [again.read(block) for block in range(3)] == [payload(block, 1) for block in range(3)]
        assert not again.has_state(3)
        assert again.checksum(2) == checksum(payload(2, 1))


def test_the_first_write_after_a_commit_goes_to_the_other_slot_and_later_ones_overwrite_it(store: BlockStore) -> None:
    seen = []
    for version in range(6):
        span = store.begin_write(2)
        assert span is not None
        assert span.offset % PAGE == 0
        assert span.nbytes == SIZES[2]
        store.written(2, version)
        assert store.location(2) == span
        seen.append(span.offset)
        if version in (1, 3):
            assert store.commit(b"").wait(WAIT_S)
    first, other = seen[0], seen[2]
    assert abs(first - other) == round_up(SIZES[2])
    assert seen == [first, first, other, other, first, first]


def test_untouched_blocks_keep_their_slot_and_their_version(tmp_path: Path, store: BlockStore) -> None:
    store.write(0, payload(0, 1))
    store.write(1, payload(1, 1))
    store.commit(b"").wait(WAIT_S)
    places = store.location(0), store.location(1)
    store.write(1, payload(1, 2))
    store.commit(b"").wait(WAIT_S)
    assert store.location(0) == places[0]
    assert store.location(1) != places[1]
    versions = [copy and copy.version for copy in store._publisher.slots.published]
    assert versions == [1, 2, None, None]


def test_a_write_waits_while_both_slots_are_named(store: BlockStore, gate: Gate) -> None:
    store.write(0, payload(0, 1))
    store.write(1, payload(1, 1))
    store.commit(b"").wait(WAIT_S)
    store.write(0, payload(0, 2))
    gate.shut()
    commit = store.commit(b"")
    assert gate.waiting.wait(WAIT_S)
    assert store.begin_write(0, timeout=0) is None, "published and published next"
    assert store.begin_write(1, timeout=0) is not None, "not written since the last commit: its other slot is free"
    store.written(1, 0)
    done: list[bytes] = []
    writer = threading.Thread(target=lambda: (store.write(0, payload(0, 3)), done.append(store.read(0))))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    assert not commit.done()
    gate.open_gate.set()
    writer.join(WAIT_S)
    assert done == [payload(0, 3)]
    assert commit.wait(WAIT_S)
    assert store.statistics().waits == 2


def test_a_commit_holds_the_writes_that_had_begun_and_none_that_began_later(tmp_path: Path, store: BlockStore) -> None:
    span = store.begin_write(0)
    assert span is not None
    commit = store.commit(b"one")
    store.write(1, payload(1, 1))  # later
    assert not commit.wait(0.05), "block 0 has not landed"
    assert commit.error is None
    with open(span.path, "r+b") as file:
        file.seek(span.offset)
        file.write(payload(0, 1))
    store.written(0, checksum(payload(0, 1)))
    assert commit.wait(WAIT_S)
    store.close()
    with BlockStore.open(tmp_path / "run") as again:
        assert again.read(0) == payload(0, 1)
        assert not again.has_state(1)


def test_commits_are_published_in_order_and_each_is_the_state_of_its_moment(
    tmp_path: Path, store: BlockStore, gate: Gate
) -> None:
    gate.shut()
    over: list[int] = []
    commits: list[Commit] = []
    for block in range(4):
        store.write(block, payload(block, 1))
        commits.append(store.commit(b"%d" % block))
        commits[-1].add_done_callback(lambda commit: over.append(commit.number))
    assert [commit.number for commit in commits] == [1, 2, 3, 4]
    assert store.statistics().pending_commits == 4
    gate.open_gate.set()
    assert store.drain(WAIT_S)
    assert over == [1, 2, 3, 4]
    assert all(commit.done() for commit in commits)
    called: list[Commit] = []
    commits[0].add_done_callback(called.append)
    assert called == [commits[0]]
    store.close()
    with BlockStore.open(tmp_path / "run") as again:
        assert (again.committed, again.metadata) == (4, b"3")
        assert [again.read(block) for block in range(4)] == [payload(block, 1) for block in range(4)]


def test_a_callback_that_fails_and_a_publication_that_takes_long(
    store: BlockStore, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commit_module, "REPORT_S", 0.02)
    gate.shut()
    store.write(0, payload(0, 1))
    first = store.commit(b"")
    first.add_done_callback(lambda commit: 1 / 0)
    opener = threading.Timer(0.2, gate.open_gate.set)
    opener.start()
    assert first.wait()
    opener.join()
    assert store.commit(b"").wait(WAIT_S)
    assert "commit 1 is being published since" in caplog.text
    assert "a callback of commit 1 failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_closing_publishes_what_has_landed_and_gives_up_what_has_not(
    tmp_path: Path, store: BlockStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(0, payload(0, 1))
    first = store.commit(b"one")
    assert store.begin_write(1) is not None
    second = store.commit(b"two")
    store.close()
    store.close()
    assert first.wait(0)
    with pytest.raises(ClosedError, match=r"commit 2 was given up.*layer\.1"):
        second.wait(0)
    assert "closing a block store while block 1" in caplog.text
    with pytest.raises(ClosedError):
        store.location(0)
    with BlockStore.open(tmp_path / "run") as again:
        assert again.metadata == b"one"


def test_a_store_that_is_dropped_lets_go_of_its_lock_and_thread(tmp_path: Path) -> None:
    made = BlockStore.create(tmp_path / "run", SPECS, identity="tiny")
    made.write(0, payload(0, 1))
    made.commit(b"one")
    del made
    with BlockStore.open(tmp_path / "run") as again:
        assert again.metadata == b"one"


def test_a_second_opener_is_refused_and_a_reader_is_not(tmp_path: Path, store: BlockStore) -> None:
    store.write(0, payload(0, 1))
    store.commit(b"one").wait(WAIT_S)
    with pytest.raises(StoreBusyError, match=rf"run is in use by another process \(pid {os.getpid()} "):
        BlockStore.open(tmp_path / "run")
    with BlockStore.open(tmp_path / "run", readonly=True) as reader:
        assert reader.read(0) == payload(0, 1)
        for write in (lambda: reader.begin_write(0), lambda: reader.commit(b"")):
            with pytest.raises(StoreError, match="read-only"):
                write()
    store.write(1, payload(1, 1))  # a reader's end did not take the writer's lock away
    with pytest.raises(StoreBusyError):
        BlockStore.open(tmp_path / "run")


def test_identity_is_compared_where_one_is_given(tmp_path: Path, store: BlockStore) -> None:
    store.close()
    with pytest.raises(StoreIdentityError, match=r"holds a run of 'tiny', and this is 'huge': name the folder"):
        BlockStore.open(tmp_path / "run", identity="huge")
    BlockStore.open(tmp_path / "run").close()


def test_misuse_is_refused(tmp_path: Path, store: BlockStore) -> None:
    with pytest.raises(StoreError, match="not being written"):
        store.written(0, 1)
    assert store.begin_write(0) is not None
    with pytest.raises(StoreError, match="being written already"):
        store.begin_write(0)
    with pytest.raises(StoreError, match="is being written"):
        store.location(0)
    with pytest.raises(UsageError, match="has 100 bytes, not 3"):
        store.write(0, b"abc")
    with pytest.raises(UsageError, match="no block named 'x'"):
        store.find("x")
    assert store.find("layer.3") == 3
    twice = [SPECS[0], SPECS[0]]
    for specs, words in (
        ([], "at least one"),
        (twice, "both named"),
        ([BlockSpec(name="", kind="", nbytes=0)], "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            BlockStore.create(tmp_path / "other", specs, identity="")
    with pytest.raises(UsageError, match="named twice"):
        BlockStore.create([tmp_path / "other", tmp_path / "other"], SPECS, identity="")
    with pytest.raises(UsageError, match="none was given"):
        BlockStore.create([], SPECS, identity="")
    assert not (tmp_path / "other").exists()


def test_a_wait_in_which_nothing_happens_ends(tmp_path: Path) -> None:
    with BlockStore.create(tmp_path / "run", SPECS, identity="", stall_s=0.05) as store:
        assert store.begin_write(1) is not None
        commit = store.commit(b"")
        with pytest.raises(StallError, match=r"commit 1 was given up: block 1 .* nothing landed"):
            commit.wait(WAIT_S)
        with pytest.raises(StallError, match="for writes to land"):
            store.drain()
        assert not store.drain(timeout=0.01)
        store.written(1, 0)
        assert store.commit(b"").wait(WAIT_S), "the store itself goes on"
        assert store.committed == 2


def test_checks_find_what_changed(store: BlockStore) -> None:
    store.write(3, payload(3, 1))
    good = payload(3, 1)
    store.check(3, good)
    store.check(3, good + b"the rest of the page")
    pieces = RunningChecksum()
    for at in range(0, len(good), 1000):
        pieces.update(memoryview(good)[at : at + 1000])
    store.check_sum(3, pieces.value())
    bad = bytearray(good)
    bad[17] ^= 1
    with pytest.raises(CorruptBlockError) as caught:
        store.check(3, bad)
    span, error = store.location(3), caught.value
    assert (error.block, error.path, error.offset) == (3, span.path, span.offset)
    assert (error.expected_checksum, error.found_checksum) == (checksum(good), checksum(bad))
    for word in (
        "block 3 (optimizer 'layer.3')",
        span.path,
        f"offset {span.offset}",
        f"{checksum(bad):016x}",
        "verify",
    ):
        assert word in str(error)
