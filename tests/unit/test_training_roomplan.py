"""What of training's room activations have."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import trainedmodel
from penstock.runtime.training.roomplan import _Room, _room_of_activations
from penstock.runtime.training.run import Settings
from penstock.scheduler.weighing import Before

ROOM = _Room(nbytes=1000, kept=(200, 400), least=100)


def layout(before: int | None, saved: int = 10_000) -> Any:
    """Of a CPU on which weights stream."""
    weighed = None if before is None else Before(nbytes=before, seconds=1.0, without_s=2.0)
    return SimpleNamespace(before=weighed, saved_nbytes=saved, back=None, resident=False, all_granted=False)


@pytest.mark.parametrize(
    ("before", "known", "expected"),
    [
        (None, True, 400),
        (None, False, 200),  # gradients leave 400, of which nobody knows whether activations need them
        (300, False, 300),  # what was weighed is had whole
        (300, True, 400),
        (100, False, 200),
        (5000, False, 900),  # gradients keep what they have at least
    ],
)
def test_only_what_nobody_has_weighed_is_halved(before: int | None, known: bool, expected: int) -> None:
    assert _room_of_activations(layout(before), Settings(), ROOM, saved_is_known=known) == expected
    assert _room_of_activations(layout(before, saved=50), Settings(), ROOM, saved_is_known=known) == 50


@pytest.mark.parametrize("calibrated", [True, False])
def test_it_is_told_why_nothing_is_weighed(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = SimpleNamespace(trusted=SimpleNamespace(hardware=None) if calibrated else None)
    monkeypatch.setattr(trainedmodel, "calibration_cache", lambda: SimpleNamespace(read=lambda device: kept))
    caplog.set_level(logging.INFO, logger=trainedmodel.__name__)
    asked: Any = SimpleNamespace(context=None, batch=4)
    nothing: Any = None
    assert trainedmodel._weighed(nothing, asked, Settings(), nothing, nothing) is None
    assert ("weights come before activations" in caplog.text) is calibrated
