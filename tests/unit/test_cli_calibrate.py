"""`penstock calibrate`: what it prints where, when it measures, and what it keeps. Nothing is measured here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from calibrations import calibration, hardware

from penstock.cli import main
from penstock.cli.calibration_table import calibration_lines
from penstock.cli.calibrations import CalibrationState
from penstock.cli.doctor import render
from penstock.memory.errors import DiskError
from penstock.runtime.calibration import calibrate as module
from penstock.runtime.calibration.fingerprint import fingerprint
from penstock.runtime.devices.base import Device
from penstock.scheduler.calibration import Calibration, decode_calibration

change = msgspec.structs.replace


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What was measured, by the arguments: nothing really is."""
    calls: list[dict[str, Any]] = []

    def measure(device: Device, folders: Sequence[str], *, quick: bool, progress: Callable[[str], None]) -> Calibration:
        calls.append({"device": device.name, "folders": list(folders), "quick": quick})
        progress("cpu memory")
        now = fingerprint(torch.device("cpu"), list(folders) or [str(tmp_path)])
        made = calibration(fingerprint=now)
        return change(made, quick=quick, taken_unix_s=time.time(), seconds=14.25)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "calibrate", measure)
    return calls


def test_it_measures_keeps_and_shows(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", "--disk", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert asked == [{"device": "cpu", "folders": [str(tmp_path)], "quick": False}]
    assert "a machine, for cpu" in out
    assert "measured in 14.2 s; kept in" in error
    assert "note: something to note" in error
    (kept,) = (tmp_path / "cache" / "penstock" / "calibration").iterdir()
    assert str(kept) in error.replace("\n", "")

    assert main(["calibrate", "--device", "cpu", "--json"]) == 0
    out, error = capsys.readouterr()
    assert len(asked) == 1
    assert decode_calibration(out.encode(), source="x") == decode_calibration(kept.read_bytes(), source="x")
    assert "--force measures again" in error

    assert main(["calibrate", "--device", "cpu", "--force", "--quick", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["quick"] is True
    assert asked[1:] == [{"device": "cpu", "folders": [], "quick": True}]
    assert "quickly; kept again in" in error


def test_what_is_kept_must_cover_what_is_asked_for(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", "--quick"]) == 0
    assert main(["calibrate", "--device", "cpu", "--quick"]) == 0
    assert len(asked) == 1
    assert main(["calibrate", "--device", "cpu"]) == 0  # a quick one is not as good
    assert len(asked) == 2
    assert main(["calibrate", "--device", "cpu", "--quick"]) == 0  # a thorough one is
    assert len(asked) == 2
    if Path("/proc").stat().st_dev != Path("/").stat().st_dev:
        assert main(["calibrate", "--device", "cpu", "--disk", "/proc"]) == 0  # another drive
        assert len(asked) == 3
    capsys.readouterr()


def test_show_measures_nothing(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["calibrate", "--device", "cpu", "--show"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "no calibration for cpu is kept in" in error
    assert "penstock calibrate --device cpu" in error
    assert main(["calibrate", "--device", "cpu"]) == 0
    capsys.readouterr()

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert main(["calibrate", "--device", "cpu", "--show"]) == 0
    out, error = capsys.readouterr()
    assert "a machine, for cpu" in out
    assert f"stale: threads of torch: {threads} then, {threads + 1} now" in error
    assert len(asked) == 1
    assert main(["calibrate", "--device", "cpu"]) == 0  # a stale one is made again without --force
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--show", "--force"], "--show measures nothing"),
        (["--show", "--disk", "/x"], "--show measures nothing"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--fast"], "--fast"),
    ],
)
def test_usage(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(["calibrate", *argv]) == 2
    assert words in capsys.readouterr().err
    assert asked == []


def test_the_figures_are_printed_even_if_they_cannot_be_kept(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.runtime.calibration.cache import CalibrationCache

    def refuse(*args: object) -> Path:
        raise DiskError("the calibration cannot be kept")

    monkeypatch.setattr(CalibrationCache, "write", refuse)
    assert main(["calibrate", "--device", "cpu"]) == 1
    out, error = capsys.readouterr()
    assert "a machine, for cpu" in out
    assert "cannot be kept" in error


def test_the_table() -> None:
    text = "\n".join(line.plain for line in calibration_lines(calibration()))
    assert "drive SSD 1 (nvme0n1), by size of request" in text
    rows = [line.split() for line in text.splitlines()]
    for row in (
        ["1", "B", "64", "KiB", "4", "MiB", "spread"],
        ["read", "-", "1.00", "3.00", "35%"],
        ["write", "2.00", "-", "-", "5%"],
        ["bfloat16", "30.00", "8.00", "3%"],
        ["bfloat16", "20.00", "3%"],
    ):
        assert row in rows
    assert "1000 million elements/s" in text
    assert "link" not in text
    large = change(calibration(), device="cuda:0", hardware=hardware(gpu=True))
    text = "\n".join(line.plain for line in calibration_lines(large))
    for words in ("link, by size of copy", "to device", "1.00 of each rate", "Big GPU: memory", "1500", "400"):
        assert words in text


@pytest.mark.parametrize(
    ("taken", "stale", "words"),
    [
        (None, (), "none for cpu: links are measured for a moment"),
        ("today", (), "of today for cpu, in /c"),
        ("today", ("too old", "too wet"), "stale for cpu: too old; too wet. Run `penstock calibrate`"),
    ],
)
def test_doctor_mentions_it(taken: str | None, stale: tuple[str, ...], words: str) -> None:
    from test_cli_doctor import GOOD

    state = CalibrationState(device="cpu", path="/c", taken=taken, stale=stale)
    assert words in "\n".join(line.plain for line in render(GOOD, (), (), state))


def test_doctor_finds_what_is_kept(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from penstock.cli.calibrations import kept_calibration

    assert kept_calibration("cpu").taken is None
    assert main(["calibrate", "--device", "cpu"]) == 0
    capsys.readouterr()
    state = kept_calibration("cpu")
    assert state.taken is not None
    assert state.stale == ()
