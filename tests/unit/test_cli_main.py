"""Every way to end the command line has its exit code, and only data goes to stdout."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

from penstock.cli import main
from penstock.cli.verbs import VERBS
from penstock.memory.errors import DoesNotFitError, PenstockError, UsageError


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


def verb_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setitem(VERBS, "fail", fail)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PenstockError("the disk is full"), 1, "error: the disk is full\n"),
        (UsageError("no such tier"), 2, "error: no such tier\n"),
        (DoesNotFitError("too big", tier="host", needed_nbytes=2, available_nbytes=1), 3, "error: too big\n"),
        (typer.Exit(4), 4, ""),
        (typer.Abort(), 1, "error: aborted\n"),
        (
            RuntimeError("first\nsecond"),
            1,
            "error: RuntimeError: first (set PENSTOCK_DEBUG=1 for the traceback)\n",
        ),
    ],
)
def test_errors_become_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    verb_raising(monkeypatch, error)
    assert main(["fail"]) == code
    assert capsys.readouterr() == ("", line)


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verb_raising(monkeypatch, KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verb_raising(monkeypatch, RuntimeError("why"))
    monkeypatch.setenv("PENSTOCK_DEBUG", "1")
    assert main(["fail"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: RuntimeError: why\n")


@pytest.mark.parametrize(("verb", "code"), [(lambda: None, 0), (lambda: 4, 4)])
def test_a_verb_may_return_its_code(monkeypatch: pytest.MonkeyPatch, verb: Callable[[], int | None], code: int) -> None:
    monkeypatch.setitem(VERBS, "verb", verb)
    assert main(["verb"]) == code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["docter"], "Did you mean 'doctor'?"),
        (["doctor", "--jsn"], "--json"),
        (["doctor", "surplus"], "surplus"),
        (["doctor", "--disk"], "--disk"),
        (["--nonsense"], "--nonsense"),
        ([], "Usage"),
    ],
)
def test_usage_errors_are_2_and_say_what_was_meant(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert words in out + error
    assert "Traceback" not in error


def test_version_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("penstock ")
    assert error == ""


def test_python_m_penstock_is_the_command_and_help_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "penstock", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "doctor" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "penstock.cli" in imported
    assert not imported & {"torch", "transformers", "accelerate"}


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m penstock doctor --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
