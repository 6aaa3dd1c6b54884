"""`prof run` is as good as `python`: what a script finds around itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.runtime.profiler.reader import read_profile


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "penstock", "prof", "run", *command]
    return subprocess.run(whole, capture_output=True, text=True, cwd=folder, timeout=60, check=False)


def test_the_script_may_go_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("name = 'beside'\n")
    (tmp_path / "stray.py").write_text("")
    (tmp_path / "sub" / "job.py").write_text(
        "import os, sys, beside\n"
        "os.chdir('/')\n"
        "assert os.path.isfile(__file__)\n"
        "assert sys.argv == [os.path.join('sub', 'job.py'), '-o', 'mine', '--', '-f'], sys.argv\n"
        "try:\n    import stray\nexcept ImportError:\n    print('as python')\n"
    )
    done = run(tmp_path, "-o", "run.prof", "sub/job.py", "-o", "mine", "--", "-f")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as python\n"
    assert read_profile(tmp_path / "run.prof").footer.last


def test_processes_that_a_script_spawns(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import multiprocessing\n"
        "class Box:\n    def __init__(self, value): self.value = value\n"
        "def double(box): return Box(2 * box.value)\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [Box(21)])[0].value)\n"
    )
    for command in (("job.py",), ("-f", "-m", "job")):
        done = run(tmp_path, *command)
        assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


@pytest.mark.parametrize("command", [("broken.py",), ("-m", "broken"), ("raises.py",), ("-m", "raises")])
def test_a_traceback_is_all_the_scripts(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "broken.py").write_text("def:\n")
    (tmp_path / "raises.py").write_text("def fail():\n    raise KeyError('no')\nfail()\n")
    done = run(tmp_path, *command)
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr or "KeyError: 'no'" in done.stderr
    assert "runpy" not in done.stderr
    assert "cli/prof" not in done.stderr


def test_what_the_script_does_to_the_file_is_not_its_failure(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import os, sys\nos.unlink('job.prof')\nsys.exit(5)\n")
    done = run(tmp_path, "job.py")
    assert done.returncode == 5
    assert "error: " in done.stderr
