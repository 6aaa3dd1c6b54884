"""Scratch folders: ownership, sharing, leftovers, forks."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.memory.errors import DiskError, ScratchBusyError, UsageError
from penstock.memory.filelock import FileLock
from penstock.memory.scratch import ScratchFolders, default_root

HOLDER = """
import sys, time
from penstock.memory.scratch import process_scratch
use = process_scratch().open(sys.argv[1] or None)
(use.path / "block").write_bytes(b"x" * 10)
print(use.path, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "penstock" / "scratch"


@pytest.fixture
def folders() -> Iterator[ScratchFolders]:
    made = ScratchFolders()
    yield made
    made.close_all()


def holder(folder: str, then: str) -> tuple[subprocess.Popen[str], Path]:
    """Another process with a scratch folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, then], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_default_folder_is_private_locked_with_our_pid_and_gone_afterwards(
    cache: Path, folders: ScratchFolders
) -> None:
    use = folders.open()
    assert use.path.parent == cache
    assert stat.S_IMODE(use.path.stat().st_mode) == 0o700
    assert f"pid {os.getpid()} " in use.path.with_name(use.path.name + ".lock").read_text()
    (use.path / "deep").mkdir()
    (use.path / "deep" / "block").write_bytes(b"x")
    use.close()
    use.close()
    assert everything(cache) == []


def test_each_use_has_its_own_folder_and_closes_alone(cache: Path, folders: ScratchFolders) -> None:
    with folders.open() as first, folders.open() as second:
        assert first.path != second.path
        first.close()
        assert second.path.is_dir()
    assert everything(cache) == []


def test_named_folder_is_made_shared_in_the_process_and_removed(tmp_path: Path, folders: ScratchFolders) -> None:
    named = tmp_path / "run"
    first, second = folders.open(named), folders.open(str(tmp_path / "." / "run"))
    assert stat.S_IMODE(named.stat().st_mode) == 0o700
    assert {first.path.parent, second.path.parent} == {named}
    assert first.path != second.path
    first.close()
    with pytest.raises(ScratchBusyError):  # still locked for the second use
        FileLock.acquire(named / ".penstock-lock")
    second.close()
    assert not named.exists()


def test_what_was_there_before_stays(tmp_path: Path, folders: ScratchFolders) -> None:
    (tmp_path / "mine").write_text("keep")
    with folders.open(tmp_path) as use:
        (use.path / "block").write_bytes(b"x")
    assert everything(tmp_path) == ["mine"]


def test_folder_as_it_is_keeps_the_files_of_the_caller(tmp_path: Path, folders: ScratchFolders) -> None:
    named = tmp_path / "run"
    with folders.open(named, unique=False) as use:
        assert use.path == named
        (named / "commit").write_text("keep")
    assert everything(named) == ["commit"]


def test_second_process_is_refused_with_the_pid_and_the_remedy(tmp_path: Path, folders: ScratchFolders) -> None:
    process, path = holder(str(tmp_path), "wait")
    try:
        with pytest.raises(ScratchBusyError, match=rf"in use by another process \(pid {process.pid} on .*--disk"):
            folders.open(tmp_path)
        assert (path / "block").exists()
    finally:
        end(process)
    with folders.open(tmp_path):  # the kernel dropped the lock of the killed process
        assert path.exists(), "a folder that another process made under a named folder is never removed"


def test_normal_exit_without_close_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    for folder in ("", str(tmp_path / "named")):
        process, path = holder(folder, "exit")
        process.communicate()
        assert process.returncode == 0
        assert not path.exists()
    assert everything(cache) == []
    assert not (tmp_path / "named").exists()


def test_next_start_removes_what_a_killed_process_left_and_spares_the_living(
    cache: Path, folders: ScratchFolders
) -> None:
    killed, dead = holder("", "wait")
    living, alive = holder("", "wait")
    try:
        (cache / "penstock-foreign").mkdir()  # no lock file: not known to be ours
        end(killed)
        assert (dead / "block").exists()
        with folders.open():
            assert not dead.exists()
            assert (alive / "block").exists()
            assert (cache / "penstock-foreign").is_dir()
    finally:
        end(living)


def test_leftovers_in_a_named_folder_go_only_when_it_is_said_to_be_for_scratch(
    tmp_path: Path, folders: ScratchFolders
) -> None:
    named = tmp_path / "run"
    killed, dead = holder(str(named), "wait")
    with pytest.raises(ScratchBusyError, match=f"pid {killed.pid}"):
        folders.remove_leftovers(named)
    end(killed)
    (named / "notes").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    (named / "penstock-00").symlink_to(tmp_path / "precious")
    with folders.open(named) as use:
        folders.remove_leftovers(named)  # in use, here
        assert use.path.is_dir()
        assert dead.is_dir()
    folders.remove_leftovers(named)
    assert everything(named) == ["notes", "penstock-00"]
    assert (tmp_path / "precious" / "file").read_text() == "keep"
    folders.remove_leftovers(tmp_path / "nowhere")


def test_leftover_that_is_a_symlink_is_not_followed(cache: Path, tmp_path: Path, folders: ScratchFolders) -> None:
    cache.mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    (cache / "penstock-00").symlink_to(tmp_path / "precious")
    (cache / "penstock-00.lock").touch()
    folders.open().close()
    assert (tmp_path / "precious" / "file").read_text() == "keep"


def test_forked_child_neither_deletes_nor_keeps_the_lock(tmp_path: Path, folders: ScratchFolders) -> None:
    use = folders.open(tmp_path / "run")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        use.close()
        folders.close_all()
        os.read(read_end, 1)  # outlive the parent's use
        os._exit(0)
    os.close(read_end)
    try:
        time.sleep(0.1)
        assert use.path.is_dir()
        with pytest.raises(ScratchBusyError):
            FileLock.acquire(tmp_path / "run" / ".penstock-lock")
        use.close()
        folders.open(tmp_path / "run").close()  # a lock kept alive by the child would refuse this
    finally:
        os.close(write_end)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path, folders: ScratchFolders) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"file is not a folder.*--disk"):
        folders.open(tmp_path / "file")
    with pytest.raises(DiskError, match="cannot make"):
        folders.open(tmp_path / "file" / "below")


def test_a_lock_file_that_is_a_symlink_is_refused(tmp_path: Path, folders: ScratchFolders) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / ".penstock-lock").symlink_to(tmp_path / "target")
    with pytest.raises(DiskError, match="cannot make"):
        folders.open(tmp_path)
    assert (tmp_path / "target").read_text() == "keep"


def test_lock_on_a_removed_file_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between opening and locking, the former owner removes the file: the new owner must start again on a new file.
    import fcntl

    path = tmp_path / "lock"
    real, calls = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock.acquire(path)
    assert lock is not None
    assert len(calls) == 2
    assert path.exists()
    lock.release()
    assert not path.exists()


def test_cache_folder_in_memory_is_refused_with_the_setting_to_change(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text("1 0 0:1 / / rw - tmpfs tmpfs rw\n")
    with pytest.raises(UsageError, match=r"is on tmpfs, which is memory.*XDG_CACHE_HOME or --disk"):
        default_root(tmp_path)


def test_relative_cache_setting_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda rw\n")
    assert default_root(tmp_path) == tmp_path / ".cache" / "penstock"
