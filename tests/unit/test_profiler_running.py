"""The registry of running recordings: who is found, what is cleaned up, and that no failure of it is the run's."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.runtime.profiler.running import Running, announce, find, folder, running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "penstock" / "running"


def test_a_recording_is_found_by_its_pid_until_it_ends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.parents[1])
    announcement = announce("run.prof")
    found = find(os.getpid())
    assert found is not None
    assert found.path == str(cache.parents[1] / "run.prof")
    assert found.argv == tuple(sys.argv)
    assert [file.name for file in cache.iterdir()] == [f"{os.getpid()}.json"]
    assert cache.stat().st_mode & 0o777 == 0o700
    announcement.close()
    announcement.close()
    assert find(os.getpid()) is None
    assert not list(cache.iterdir())


def test_a_later_recording_of_the_process_takes_the_place() -> None:
    first = announce("first.prof")
    second = announce("second.prof")
    first.close()
    found = find(os.getpid())
    assert found is not None
    assert found.path.endswith("second.prof")
    second.close()
    assert running() == ()


def test_entries_of_dead_processes_and_of_reused_pids_go(cache: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    announce("mine.prof").close()
    for pid in (dead.pid, os.getpid()):
        entry = Running(pid=pid, created_unix_s=1.0, path="/x.prof", argv=())
        (cache / f"{pid}.json").write_bytes(msgspec.json.encode(entry))
    (cache / "12.json").write_text("{")
    assert running() == ()
    assert not list(cache.iterdir())


def test_a_forked_child_leaves_its_parents_entry() -> None:
    announcement = announce("run.prof")
    child = os.fork()
    if not child:
        announcement.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert find(os.getpid()) is not None
    announcement.close()


def test_a_cache_that_cannot_be_written_fails_nothing(cache: Path) -> None:
    cache.parent.write_text("a file where a folder should be")
    announcement = announce("run.prof")
    assert announcement.file is None
    announcement.close()
    assert running() == ()


def test_the_folder_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == tmp_path / ".cache" / "penstock" / "running"
