"""`penstock prof report` and `export` through `main`: files that are whole, and never over others."""

import gzip
import json
import os
from pathlib import Path

import pytest
from profiles import streamed
from summaries import Recordings, summary

from penstock.cli import main


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return Recordings(monkeypatch)


@pytest.fixture
def run(recordings: Recordings, tmp_path: Path) -> str:
    """A good profile."""
    return recordings.add(tmp_path / "run.prof", streamed(), summary())


def test_report_is_written_once_unless_forced(
    recordings: Recordings, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.html"
    assert main(["prof", "report", run]) == 0
    out, error = capsys.readouterr()
    assert out == f"{target}\n"
    assert error == "disk-bound: 75% of idle time waits on reads (50 B of HTML)\n"
    assert target.read_text() == "<p>disk-bound: 75% of idle time waits on reads</p>"
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert recordings.reports[0]["title"] == "run.prof"
    assert [number for number, _ in recordings.reports[0]["idle_steps"]] == [0]
    assert recordings.reports[0]["other"] is None
    target.write_text("mine")
    assert main(["prof", "report", run]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: {target} is there already: overwrite it by --force, or name another file by -o\n",
    )
    assert target.read_text() == "mine"
    assert main(["prof", "report", run, "-f"]) == 0
    assert target.read_text().startswith("<p>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html"]


def test_report_draws_another_run_over_it(
    recordings: Recordings, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = streamed(), summary(verdict="held up by the host")
    other = recordings.add(tmp_path / "before.prof", *before)
    assert main(["prof", "report", run, "--against", other]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.html'}\n"
    assert recordings.reports[0]["other"] == before
    assert recordings.reports[0]["title"] == "run.prof against before.prof"


def test_report_against_no_profile_writes_nothing(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof", "report", run, "--against", str(tmp_path / "missing.prof")]) == 1
    assert capsys.readouterr() == ("", f"error: {tmp_path / 'missing.prof'} is no profile\n")
    assert not list(tmp_path.iterdir())


def test_report_opens_a_browser_when_asked(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert main(["prof", "report", run, "-o", str(tmp_path / "a b.html"), "--open"]) == 0
    assert opened == [(tmp_path / "a b.html").as_uri()]


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("folder", 2, "is a folder: name a file by -o"),
        ("missing/out.zip", 1, "No such file or directory. Name a file in another folder by -o."),
        ("file/out.zip", 1, "Not a directory. Name a file in another folder by -o."),
    ],
)
def test_outputs_that_cannot_be_are_one_line(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, code: int, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert main(["prof", "export", run, "--to", "csv", "-o", str(tmp_path / target)]) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.endswith(f"{words}\n")


def test_a_failure_while_writing_leaves_nothing(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, mode: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.chmod", fail)
    assert main(["prof", "export", run, "--to", "chrome"]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path / 'run.trace.json.gz'}: No space left on device. Name a file in another folder "
        "by -o.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "name", "magic"),
    [
        ("perfetto", "run.pftrace.gz", b"\x1f\x8b"),
        ("chrome", "run.trace.json.gz", b"\x1f\x8b"),
        ("speedscope", "run.speedscope.json", b"{"),
        ("csv", "run.csv.zip", b"PK"),
    ],
)
def test_export_names_the_file_and_what_opens_it(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, name: str, magic: bytes
) -> None:
    assert main(["prof", "export", run, "--to", to]) == 0
    out, error = capsys.readouterr()
    assert out == f"{tmp_path / name}\n"
    assert "; open it in " in error
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert main(["prof", "export", run, "--to", to]) == 2
    assert main(["prof", "export", run, "--to", to, "--force"]) == 0


def test_the_chrome_export_is_json(run: str, tmp_path: Path) -> None:
    assert main(["prof", "export", run, "--to", "chrome", "-o", str(tmp_path / "x")]) == 0
    assert json.loads(gzip.decompress((tmp_path / "x").read_bytes()))["traceEvents"]


def test_an_unknown_format_is_2(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof", "export", run, "--to", "pdf"]) == 2
    assert "speedscope" in capsys.readouterr().err


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
