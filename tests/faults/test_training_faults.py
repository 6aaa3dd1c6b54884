"""What goes wrong with the files of a training run surfaces, names the file, and costs nothing that was committed."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from breaking import breaking, fails, readonly_disk
from training_child import CASES, STEPS
from training_reference import PLENTY
from training_runs import COMMITTED, Run, begin, check_whole, resume, resumed_or_error, told

import penstock
from penstock.memory.errors import (
    CorruptBlockError,
    DiskError,
    PenstockError,
    StallError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreVersionError,
)
from penstock.memory.store import BlockStore
from penstock.memory.store.folder import MANIFEST, PREVIOUS
from penstock.memory.store.sealed import seal
from penstock.runtime.training.pipeline import ShardPipeline
from penstock.runtime.training.run import FORMAT

pytestmark = pytest.mark.usefixtures("one_thread", "states_on_disk")
DRIVE: list[tuple[str, str, int, str]] = [
    ("pwritev", "blocks.data", errno.ENOSPC, "free space"),
    ("pwritev", "blocks.data", errno.EIO, "dmesg"),
    ("pwritev", "weights.bin", errno.ENOSPC, "free space"),
    ("preadv", "blocks.data", errno.EIO, "dmesg"),
    ("preadv", "weights.bin", errno.EIO, "dmesg"),
]


@pytest.mark.parametrize(("operation", "name", "code", "remedy"), DRIVE)
@pytest.mark.parametrize("kind", list(CASES))
def test_a_drive_that_fails_in_a_step(
    kind: str, operation: str, name: str, code: int, remedy: str, tmp_path: Path
) -> None:
    run = begin(tmp_path / "run", kind)
    try:
        with breaking(operation, name, fails(code), after=3) as broken, pytest.raises(PenstockError) as caught:
            run.go_and_save(STEPS)
        assert broken
        message = told(caught.value)
        for words in (broken[0], "offset", os.strerror(code), remedy):
            assert words in message
        if operation == "pwritev" or name == "blocks.data":  # weights may be read again, and then nothing is lost
            for again in (lambda: run.trainer.optimizer.step(), run.save):
                with pytest.raises(PenstockError):
                    again()
    finally:
        run.close()
    check_whole(run.folder, run.host, kind)


@pytest.mark.parametrize(("operation", "name"), [("pwritev", "blocks.data"), ("pwrite", "manifest.new")])
def test_writes_in_pieces_are_put_together(operation: str, name: str, tmp_path: Path) -> None:
    """Of any length: a signal may cut them anywhere."""
    run = begin(tmp_path / "run")

    def some(plain: Callable[..., Any], fd: int, data: Any, offset: int) -> int:
        whole = data[0] if isinstance(data, list) else data
        part = whole[: max(1, len(whole) // 2 - 3)] if len(whole) > 1000 else whole
        if operation == "pwritev":
            return os.pwrite(fd, part, offset) if len(part) % 4096 == 0 else _plainly(fd, part, offset)
        count: int = plain(fd, part, offset)
        return count

    try:
        with breaking(operation, name, some) as broken:
            run.go(6)
            run.save().wait()
        assert broken
    finally:
        run.close()
    check_whole(run.folder, run.host, step=6)


def _plainly(fd: int, part: memoryview, offset: int) -> int:
    """Past O_DIRECT, which takes whole pages only."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    try:
        return os.pwrite(again, part, offset)
    finally:
        os.close(again)


def test_a_drive_that_takes_nothing_and_says_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    try:
        with breaking("pwritev", "blocks.data", lambda *_: 0), pytest.raises(PenstockError) as caught:
            run.go(STEPS)
        assert "takes none of them" in told(caught.value)
    finally:
        run.close()
    check_whole(run.folder, run.host)


COMMITS: list[tuple[str, str, int, bool]] = [
    ("pwrite", "manifest.new", errno.ENOSPC, True),
    ("open", "manifest.new", errno.ENOSPC, True),
    ("fdatasync", "blocks.data", errno.EIO, False),
    ("fsync", "manifest.new", errno.EIO, True),
    ("rename", "manifest.new", errno.EIO, False),
]


@pytest.mark.parametrize(("operation", "name", "code", "goes_on"), COMMITS)
def test_a_commit_that_fails(operation: str, name: str, code: int, goes_on: bool, tmp_path: Path) -> None:
    """A manifest that cannot be written costs that commit; what may be lost costs the steps since the last one."""
    run = begin(tmp_path / "run")
    try:
        run.go(6)
        with breaking(operation, name, fails(code)) as broken, pytest.raises(PenstockError) as caught:
            run.save().wait()
        assert broken[0] in told(caught.value)
        assert os.strerror(code) in told(caught.value)
        if goes_on:
            run.go(7)
            run.save().wait()
        else:
            with pytest.raises(StoreError, match="stopped after commit"):
                run.go_and_save(7)
    finally:
        run.close()
    check_whole(run.folder, run.host, step=7 if goes_on else COMMITTED)


def test_a_drive_that_does_not_answer_is_reported_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ShardPipeline.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(ShardPipeline.__init__.__kwdefaults__, "watch_s", 0.1)
    monkeypatch.setitem(ShardPipeline.__init__.__kwdefaults__, "stall_s", 0.4)
    run, answered = begin(tmp_path / "run"), threading.Event()

    def hang(plain: Callable[..., Any], *args: Any) -> Any:
        answered.wait(20)
        return plain(*args)

    try:
        with breaking("preadv", "blocks.data", hang), caplog.at_level(logging.WARNING):
            with pytest.raises(PenstockError) as caught:
                run.go(STEPS)
            assert isinstance(caught.value, StallError) or isinstance(caught.value.__cause__, StallError)
            for words in ("shard", "nothing moved", "buffers", str(run.folder / "states"), "penstock.resume"):
                assert words in told(caught.value)
            assert any("waits for shard" in record.getMessage() for record in caplog.records)
            answered.set()
    finally:
        answered.set()
        run.close()
    check_whole(run.folder, run.host)


def test_bits_that_flip_are_noticed_or_do_not_matter(tmp_path: Path) -> None:
    """Anywhere in any file of the run. A commit has two copies of its manifest, and states of which one is in use."""
    run = begin(tmp_path / "good", placement="resident")
    run.go(5)
    run.save().wait()
    run.close()
    good, draw, noticed, survived = run.folder, random.Random(8), 0, 0
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    assert [path.name for path in files] == ["blocks.data", "manifest", "manifest.previous", "penstock-store"]
    for file in files * 6:
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        raw = bytearray((folder / file).read_bytes())
        at = draw.randrange(len(raw))
        raw[at] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(raw)
        found = resumed_or_error(folder)
        if isinstance(found, Run):
            survived += 1
            assert found.step == 5
            found.check()
            found.close()
        else:
            noticed += 1
            assert str(folder / file) in str(found)
            if isinstance(found, CorruptBlockError):
                assert f"offset {found.offset}" in str(found)
                assert found.offset <= at
        shutil.rmtree(folder)
    assert noticed
    assert survived


def test_both_copies_of_the_last_manifest_are_gone(tmp_path: Path) -> None:
    """The commit before it takes its place only while all of it is there."""
    run = begin(tmp_path / "run")
    run.close()
    manifest = run.folder / "states" / MANIFEST
    kept = manifest.read_bytes()
    manifest.unlink()
    for start in (resume, begin):  # the commit before it is the empty one
        with pytest.raises(StoreDamagedError, match=f"{MANIFEST} is missing.*back from a copy"):
            start(run.folder)
    manifest.write_bytes(kept)

    run = resume(run.folder, run.host)
    run.save().wait()  # the same again: nothing was written over
    run.close()
    manifest.unlink()
    run = resume(run.folder, run.host)
    run.check()
    run.go(7)
    run.save().wait()
    run.go(8)  # and now the commit before is written over
    run.close()
    manifest.unlink()
    with pytest.raises(StoreDamagedError, match=r"is missing.*were written again"):
        resume(run.folder)
    (run.folder / "states" / PREVIOUS).unlink()
    with pytest.raises(StoreError, match=r"has no commit.*Bring the file back"):
        resume(run.folder)


def test_a_run_of_another_version(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.close()
    with BlockStore.open(run.folder / "states") as store:
        whole = store.metadata

    def commit(metadata: bytes) -> None:
        with BlockStore.open(run.folder / "states") as store:
            store.commit(metadata).wait()

    for number, other in ((FORMAT + 1, "newer"), (FORMAT - 1, "older")):
        commit(msgspec.msgpack.encode(msgspec.msgpack.decode(whole) | {"format": number, "steps": "said otherwise"}))
        with pytest.raises(StoreVersionError, match=f"format {number}.*{other} penstock"):
            resume(run.folder)
    commit(whole)
    check_whole(run.folder, run.host)
    manifest = run.folder / "states" / MANIFEST
    manifest.write_bytes(seal(b"mnfs", b"of the future", 2))
    with pytest.raises(StoreError, match="version 2"):
        resume(run.folder)


def test_two_writers(tmp_path: Path) -> None:
    """The second is refused before its model has given its weights up, and the first goes on."""
    run = begin(tmp_path / "run")
    try:
        mine = CASES["step"].build()
        before = {name: value.clone() for name, value in mine.state_dict().items()}
        with pytest.raises(StoreBusyError, match=str(os.getpid())):
            penstock.resume(run.folder, model=mine, device="cpu")
        with pytest.raises(StoreBusyError, match=str(os.getpid())):
            penstock.prepare(mine, optimizer=CASES["step"].optimizer, disk=run.folder, device="cpu")
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
        run.go(STEPS)
        run.check()
        run.save().wait()
    finally:
        run.close()


@pytest.mark.parametrize("what", ["resume", "prepare"])
def test_a_disk_that_is_read_only(what: str, tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.close()
    choice, options = CASES["step"].optimizer, {"device": "cpu", "max_memory": {"host": PLENTY}}
    start: dict[str, Callable[[], Any]] = {
        "resume": lambda: resume(run.folder),
        "prepare": lambda: penstock.prepare(CASES["step"].build(), optimizer=choice, disk=tmp_path / "new", **options),
    }
    with readonly_disk(), pytest.raises(DiskError, match=r"Read-only.*(--disk|--out|disk=)"):
        start[what]()
    check_whole(run.folder, run.host)
