"""Filesystem calls that fail under the block store: a clear error, and the last commit as it was."""

import errno
import os
import random
from pathlib import Path

import pytest
from store_files import FailingFiles

from penstock.memory.arena import PAGE
from penstock.memory.errors import DiskError, DoesNotFitError, PenstockError, StoreDamagedError, StoreError
from penstock.memory.store import BlockSpec, BlockStore, SystemFiles, prune, verify

WAIT_S = 20.0
SPECS = [BlockSpec(name=f"b{i}", kind="k", nbytes=PAGE + 100 * i) for i in range(3)]


def payload(block: int, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(SPECS[block].nbytes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A store at commit 1: all blocks in version 1."""
    with BlockStore.create(tmp_path / "run", SPECS, identity="i", files=FailingFiles()) as store:
        for block in range(3):
            store.write(block, payload(block, 1))
        assert store.commit(b"one").wait(WAIT_S)
    return tmp_path / "run"


def contents(run: Path) -> tuple[bytes, list[bytes]]:
    with BlockStore.open(run, files=FailingFiles()) as store:
        return store.metadata, [store.read(block) for block in range(3)]


ONE = b"one", [payload(block, 1) for block in range(3)]
TWO = b"two", [payload(0, 2), payload(1, 1), payload(2, 1)]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "operation",
    [
        "create penstock-store.new",
        "pwrite penstock-store.new",
        "fsync penstock-store.new",
        "rename penstock-store.new",
        "fsync run",
        "create blocks.data",
        "allocate blocks.data",
        "fsync blocks.data",
        "create manifest.new",
        "pwrite manifest.new",
        "fsync manifest.new",
        "rename manifest.new",
    ],
)
def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path: Path, operation: str, code: int) -> None:
    files = FailingFiles()
    files.fail[operation] = code
    with pytest.raises(PenstockError) as caught:
        BlockStore.create(tmp_path / "run", SPECS, identity="", files=files)
    message = str(caught.value)
    assert operation.split()[1] in message
    if (operation, code) == ("allocate blocks.data", errno.ENOSPC):
        assert isinstance(caught.value, DoesNotFitError)
        assert "free space there" in message
    else:
        assert isinstance(caught.value, DiskError)
        assert os.strerror(code) in message
    assert list(tmp_path.iterdir()) == []
    BlockStore.create(tmp_path / "run", SPECS, identity="", files=FailingFiles()).close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(
    "operation", ["create manifest.new", "pwrite manifest.new", "fsync manifest.new", "close manifest.new"]
)
def test_a_manifest_that_cannot_be_written_costs_one_commit(run: Path, operation: str, code: int) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 99))
        files.fail[operation] = code
        commit = store.commit(b"lost")
        with pytest.raises(DiskError, match=rf"manifest\.new: {os.strerror(code)}; "):
            commit.wait(WAIT_S)
        assert (commit.done(), store.committed) == (True, 1)
        assert not (run / "manifest.new").exists()
        store.write(0, payload(0, 2))  # in place: the cut that named the slot is gone
        files.fail.clear()
        assert store.commit(b"two").wait(WAIT_S)
    assert contents(run) == TWO


def test_the_last_commit_is_found_after_a_commit_failed(run: Path) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        for version in range(2, 5):
            store.write(0, payload(0, version))
            files.fail["pwrite manifest.new"] = errno.ENOSPC
            with pytest.raises(DiskError, match="the disk is full: free space there"):
                store.commit(b"lost").wait(WAIT_S)
    assert contents(run) == ONE


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", ["fdatasync blocks.data", "rename manifest.new", "fsync run"])
def test_after_a_sync_that_failed_nothing_is_believed(run: Path, operation: str, code: int) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 2))
        files.fail[operation] = code
        commit = store.commit(b"two")
        with pytest.raises((DiskError, StoreError), match=os.strerror(code)):
            commit.wait(WAIT_S)
        assert isinstance(commit.error, DiskError)
        files.fail.clear()  # the next fsync would succeed, and would mean nothing
        tried = files.seen.count(operation)
        for use in (lambda: store.commit(b""), lambda: store.begin_write(1), lambda: store.read(0), store.drain):
            with pytest.raises(
                StoreError, match=rf"stopped after commit 1: .*{os.strerror(code)}.*go on from commit 1"
            ):
                use()
        store.close()
        assert files.seen.count(operation) == tried
    # A rename whose folder was not synced is there as long as the machine runs.
    assert contents(run) == (TWO if operation == "fsync run" else ONE)


def test_commits_that_wait_behind_a_failed_one_fail_with_it(run: Path) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 2))
        assert store.begin_write(1) is not None
        files.fail["fdatasync blocks.data"] = errno.EIO
        commits = [store.commit(b"%d" % number) for number in range(3)]
        store.written(1, 0)
        with pytest.raises(DiskError):
            commits[0].wait(WAIT_S)
        for commit in commits[1:]:
            with pytest.raises(StoreError, match="stopped after commit 1"):
                commit.wait(WAIT_S)
    assert contents(run) == ONE


def test_a_write_that_waits_is_told_of_the_failure(run: Path) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 2))
        assert store.begin_write(1) is not None  # holds the commit up
        files.fail["fdatasync blocks.data"] = errno.EIO
        store.commit(b"two")
        assert store.begin_write(0, timeout=0) is None
        store.write_failed(1, OSError(errno.EIO, "gone"))
        with pytest.raises(StoreError, match="gone"):
            store.begin_write(0)
    assert contents(run) == ONE


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_block_that_cannot_be_written_stops_the_store(run: Path, code: int) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 2))
        files.fail["pwrite blocks.data"] = code
        with pytest.raises(DiskError, match=rf"cannot write {SPECS[1].nbytes} bytes at offset \d+ of .*blocks\.data"):
            store.write(1, payload(1, 2))
        files.fail.clear()
        with pytest.raises(StoreError, match="stopped after commit 1"):
            store.commit(b"two")
    assert contents(run) == ONE


def test_a_block_that_cannot_be_read(run: Path) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        files.fail["pread blocks.data"] = errno.EIO
        with pytest.raises(DiskError, match=r"cannot read .*blocks\.data.*dmesg"):
            store.read(0)
        files.fail.clear()
        assert store.read(0) == payload(0, 1)


class Pieces(SystemFiles):
    """Reads and writes 777 bytes at a time, or none."""

    most = 777

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return super().pwrite(fd, data[: self.most], offset)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        return super().pread(fd, min(nbytes, self.most), offset)


def test_short_writes_and_reads_are_put_together(run: Path) -> None:
    with BlockStore.open(run, files=Pieces()) as store:
        store.write(0, payload(0, 2))
        assert store.read(0) == payload(0, 2)
        assert store.commit(b"two").wait(WAIT_S)
    assert contents(run) == TWO


def test_writes_that_take_nothing_are_an_error(run: Path) -> None:
    files = Pieces()
    with BlockStore.open(run, files=files) as store:
        files.most = 0
        with pytest.raises(DiskError, match="takes none of them"):
            store.commit(b"two").wait(WAIT_S)
        with pytest.raises(DiskError, match="takes none of them"):
            store.write(0, payload(0, 2))
    assert contents(run) == ONE


@pytest.mark.parametrize("operation", ["link manifest", "unlink manifest.previous"])
@pytest.mark.parametrize("code", [errno.EPERM, errno.EIO, errno.EOPNOTSUPP])
def test_a_commit_needs_no_spare_manifest(run: Path, operation: str, code: int) -> None:
    files = FailingFiles()
    with BlockStore.open(run, files=files) as store:
        store.write(0, payload(0, 2))
        files.fail[operation] = code
        assert store.commit(b"two").wait(WAIT_S)
    assert contents(run) == TWO


def test_a_disk_that_has_become_read_only(run: Path) -> None:
    files = FailingFiles()
    files.fail["open for writing blocks.data"] = errno.EROFS
    with pytest.raises(DiskError, match=r"cannot open .*blocks\.data: Read-only file system; .*another folder"):
        BlockStore.open(run, files=files)
    with BlockStore.open(run, files=files, readonly=True) as store:
        assert store.read(0) == payload(0, 1)
    assert verify(run, files=files).good
    changed = [what for what in files.seen if what.startswith("open for") or what.split()[0] not in ("open", "pread")]
    assert changed == ["open for writing blocks.data"]
    assert contents(run) == ONE


def test_a_disk_that_was_filled_after_pruning(run: Path) -> None:
    prune(run)
    files = FailingFiles()
    files.fail["allocate blocks.data"] = errno.ENOSPC
    with pytest.raises(DoesNotFitError, match=r"blocks\.data, two slots for each block"):
        BlockStore.open(run, files=files)
    assert verify(run).good
    assert contents(run) == ONE


def test_a_filesystem_that_cannot_make_holes(run: Path) -> None:
    files = FailingFiles()
    files.fail["punch blocks.data"] = errno.EOPNOTSUPP
    with pytest.raises(DiskError, match=r"cannot punch a hole of .*blocks\.data"):
        prune(run, files=files)
    assert contents(run) == ONE


@pytest.mark.parametrize("left", [0, 5 * PAGE, 12 * PAGE - 1, 12 * PAGE + 1])
def test_a_data_file_of_another_length(run: Path, left: int) -> None:
    os.truncate(run / "blocks.data", left)
    with pytest.raises(StoreDamagedError, match=rf"blocks\.data has {left} bytes and had \d+ when the store was made"):
        BlockStore.open(run)
