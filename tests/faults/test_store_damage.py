"""Folders that are not what a block store left there: damaged, incomplete, another's, in use."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.memory.arena import PAGE
from penstock.memory.errors import (
    CorruptBlockError,
    DiskError,
    ForkError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreVersionError,
)
from penstock.memory.store import BlockSpec, BlockStore, verify
from penstock.memory.store.sealed import FORMAT_VERSION, seal, unseal

WAIT_S = 20.0
SPECS = [BlockSpec(name=f"b{i}", kind="k", nbytes=PAGE + 100 * i) for i in range(3)]


def payload(block: int, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(SPECS[block].nbytes)


def make(folder: Path, versions: int) -> Path:
    """A store at commit `versions`; each commit wrote all blocks."""
    with BlockStore.create(folder, SPECS, identity="i") as store:
        for version in range(1, versions + 1):
            for block in range(3):
                store.write(block, payload(block, version))
            assert store.commit(b"%d" % version).wait(WAIT_S)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make(tmp_path / "run", 2)


def check_contents(run: Path, version: int) -> None:
    with BlockStore.open(run) as store:
        assert store.metadata == b"%d" % version
        assert [store.read(block) for block in range(3)] == [payload(block, version) for block in range(3)]


def flip(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1 << offset % 8
    path.write_bytes(bytes(data))


def picture(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["manifest", "penstock-store"])
def test_a_bit_that_flipped_in_a_small_file_is_made_good(run: Path, name: str) -> None:
    whole = (run / name).read_bytes()
    for offset in random.Random(0).sample(range(len(whole)), 60):
        flip(run / name, offset)
        check_contents(run, 2)
        (run / name).write_bytes(whole)


def test_a_damaged_copy_is_told_and_replaced_by_the_next_commit(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(run / "manifest", 40)
    with caplog.at_level(logging.WARNING), BlockStore.open(run) as store:
        assert "one of the two copies in" in caplog.text
        store.commit(b"2").wait(WAIT_S)
    caplog.clear()
    check_contents(run, 2)
    assert not caplog.records


def test_a_bit_that_flipped_in_a_block_is_seen_when_it_is_read(run: Path) -> None:
    with BlockStore.open(run) as store:
        span = store.location(1)
        flip(Path(span.path), span.offset + 4000)
        assert store.read(0) == payload(0, 2)
        with pytest.raises(
            CorruptBlockError, match=rf"block 1 \(k 'b1'\) is corrupt.* offset {span.offset} of .*verify"
        ):
            store.read(1)
    assert [bad.block for bad in verify(run).bad] == [1]


@pytest.mark.parametrize("damage", ["both copies", "removed", "torn", "empty"])
def test_the_commit_before_takes_the_place_of_a_lost_manifest_while_it_is_whole(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    lose(run / "manifest", damage)
    report = verify(run)
    assert (report.commit, report.bad, report.good) == (1, (), False)
    assert "manifest" in report.doubt
    with caplog.at_level(logging.WARNING), BlockStore.open(run) as store:
        assert store.metadata == b"1"
        assert "commit 1 is whole and is used" in caplog.text
        store.write(0, payload(0, 3))
        store.commit(b"three").wait(WAIT_S)
    with BlockStore.open(run) as store:  # the choice was made once, for good
        assert store.metadata == b"three"
        assert [store.read(block) for block in range(3)] == [payload(0, 3), payload(1, 1), payload(2, 1)]


@pytest.mark.parametrize("damage", ["both copies", "removed", "torn"])
def test_the_commit_before_is_not_believed_once_its_slots_were_written_again(run: Path, damage: str) -> None:
    with BlockStore.open(run) as store:
        store.write(1, payload(1, 3))  # over version 1, and never committed
    lose(run / "manifest", damage)
    before = picture(run)
    with pytest.raises(StoreDamagedError, match=r"manifest.*Commit 1, .*cannot take its place: 1 of .*'b1' among"):
        BlockStore.open(run)
    assert [bad.block for bad in verify(run).bad] == [1]
    assert picture(run) == before


def lose(path: Path, damage: str) -> None:
    nbytes = path.stat().st_size
    if damage == "both copies":
        flip(path, 50, nbytes // 2 + 50)
    elif damage == "removed":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "empty" else 300)


def test_both_manifests_lost(run: Path) -> None:
    lose(run / "manifest", "torn")
    lose(run / "manifest.previous", "torn")
    with pytest.raises(StoreDamagedError, match=r"manifest is damaged.*, and .*manifest\.previous is damaged.*a copy"):
        BlockStore.open(run)
    (run / "manifest.previous").unlink()
    with pytest.raises(StoreDamagedError, match=r"manifest is damaged.*there is no .*manifest\.previous either"):
        BlockStore.open(run)
    (run / "manifest").unlink()
    with pytest.raises(StoreError, match=r"has no commit: .*manifest is missing.*Bring the file back"):
        BlockStore.open(run)


@pytest.mark.parametrize(
    ("name", "words"),
    [("penstock-store", "has no block store in it"), ("blocks.data", r"blocks\.data is missing: was the folder moved")],
)
def test_other_files_that_are_missing(run: Path, name: str, words: str) -> None:
    (run / name).rename(run / "elsewhere")
    before = picture(run)
    with pytest.raises(StoreError, match=words):
        BlockStore.open(run)
    assert picture(run) == before
    (run / "elsewhere").rename(run / name)
    check_contents(run, 2)


@pytest.mark.parametrize(("version", "word"), [(FORMAT_VERSION + 1, "newer"), (FORMAT_VERSION - 1, "older")])
@pytest.mark.parametrize(("name", "kind"), [("manifest", b"mnfs"), ("penstock-store", b"labl")])
def test_another_version_of_the_format(run: Path, name: str, kind: bytes, version: int, word: str) -> None:
    good = (run / name).read_bytes()
    (run / name).write_bytes(seal(kind, unseal(kind, good, "").body, version))
    before = picture(run)
    with pytest.raises(StoreVersionError, match=rf"{name} is of version {version}.*this penstock reads.*{word}"):
        BlockStore.open(run)
    assert picture(run) == before
    (run / name).write_bytes(good)
    check_contents(run, 2)


def test_a_manifest_or_a_part_of_another_store(run: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", 1)
    good = (run / "manifest").read_bytes()
    (run / "manifest").write_bytes((other / "manifest").read_bytes())
    with pytest.raises(StoreDamagedError, match="is not part 0 of the store"):
        BlockStore.open(run)
    (run / "manifest").write_bytes(good)
    with pytest.raises(StoreError, match="belong to different stores"):
        BlockStore.open([run, other])
    check_contents(run, 2)


@pytest.mark.parametrize("name", ["manifest", "blocks.data", "penstock-store"])
def test_links_and_pipes_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).rename(tmp_path / "precious")
    (run / name).symlink_to(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    with pytest.raises(StoreError, match=rf"{name} is a symbolic link"):
        BlockStore.open(run)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(StoreError, match=rf"{name} is not a plain file"):
        BlockStore.open(run)
    assert (tmp_path / "precious").read_bytes() == before


def test_nothing_that_is_not_ours_is_touched(tmp_path: Path, run: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "lookalike").mkdir()
    (tmp_path / "lookalike" / "blocks.data").write_text("somebody's data")
    (tmp_path / "file").write_text("a file")
    before = picture(tmp_path)
    with pytest.raises(
        StoreError, match=r"thesis is not empty and not a block store: it holds chapter\.tex.*Nothing there"
    ):
        BlockStore.create(tmp_path / "thesis", SPECS, identity="")
    with pytest.raises(StoreError, match=r"lookalike holds blocks\.data but no penstock-store"):
        BlockStore.create(tmp_path / "lookalike", SPECS, identity="")
    with pytest.raises(StoreError, match=r"run holds a block store at commit 2.*go on with it"):
        BlockStore.create(run, SPECS, identity="")
    with pytest.raises(StoreError):  # the new folder that was named with it goes again
        BlockStore.create([tmp_path / "new", run], SPECS, identity="")
    with pytest.raises(DiskError, match=r"file is not a folder\. Choose another"):
        BlockStore.create(tmp_path / "file", SPECS, identity="")
    assert picture(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_store_without_a_commit_may_be_made_again(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    BlockStore.create(folders, SPECS, identity="first").close()
    with pytest.raises(StoreError, match=r"b is part 1 of a block store whose home folder was .*/a\."):
        BlockStore.create(folders[1], SPECS, identity="")
    with BlockStore.create(folders, SPECS[:2], identity="second") as store:
        assert len(store.blocks) == 2
    (folders[0] / "manifest").unlink()  # as if its making had been cut off
    with pytest.raises(StoreError, match="killed before it was finished"):
        BlockStore.open(folders[0])
    BlockStore.create(folders, SPECS, identity="third").close()
    with BlockStore.open(folders[0]) as store:
        assert store.identity == "third"


HOLDER = """
import sys, time
from penstock.memory.store import BlockStore
store = BlockStore.open(sys.argv[1])
store.write(0, bytes(store.blocks[0].nbytes))
print("open", flush=True)
time.sleep(60)
"""


def test_two_processes_on_one_folder(run: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    try:
        with pytest.raises(StoreBusyError, match=rf"run is in use by another process \(pid {process.pid} on .*Wait"):
            BlockStore.open(run)
        with pytest.raises(StoreBusyError):
            BlockStore.create(run, SPECS, identity="")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    check_contents(run, 2)


def test_a_forked_child_neither_uses_the_store_nor_keeps_its_lock(run: Path) -> None:
    store = BlockStore.open(run)
    store.write(0, payload(0, 3))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        refused = 0
        for use in (lambda: store.read(0), lambda: store.begin_write(1), lambda: store.commit(b""), store.statistics):
            try:
                use()
            except ForkError:
                refused += 1
        store.close()
        os.read(read_end, 1)  # outlive the parent's use
        os._exit(refused)
    os.close(read_end)
    try:
        time.sleep(0.1)
        with pytest.raises(StoreBusyError):
            BlockStore.open(run)
        assert store.commit(b"three").wait(WAIT_S)
        store.close()
        with BlockStore.open(run) as again:  # a lock kept alive by the child would refuse this
            assert again.read(0) == payload(0, 3)
    finally:
        os.close(write_end)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
