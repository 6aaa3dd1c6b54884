"""Activations with room before weights and gradients: weights stream, less is made again, the bits are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from activation_rooms import slow_processor
from test_training_activations import SHORT, keeper_of, language
from training_reference import Reference, Streamed, find_placement
from zoo import differences

import penstock
from penstock import trainedmodel
from penstock.runtime.training import activations, room, selection
from penstock.scheduler.weighing import Dear, Part, Weighing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
CASE = SHORT["llama"]
ROOM = 128 << 10


def prepare(folder: Path, host: int, **options: Any) -> Streamed:
    return Streamed(
        *penstock.prepare(
            CASE.build(), optimizer=CASE.optimizer, disk=folder, max_memory={"host": host}, device="cpu", **options
        )
    )


def weighed(monkeypatch: pytest.MonkeyPatch, step: Weighing | None) -> None:
    """Have prepare take a step for this."""
    monkeypatch.setattr(trainedmodel, "_weighed", lambda *_: step)


def test_more_is_held_and_the_bits_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAST_BUFFER", "MOST_BUFFER"):
        monkeypatch.setattr(activations, name, 4096)
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", 4096)
    slow_processor(monkeypatch)
    options: dict[str, Any] = {"activations": "auto", "context": 10, "batch": 2}
    weighed(monkeypatch, None)
    _, memory = find_placement(CASE, tmp_path / "asked", "smallest", **options)
    host = memory["host"] + ROOM * 5 // 4
    trainer = prepare(tmp_path / "plain", host, **options)
    plain = trainer.model.penstock.plan
    assert any("there is no room for any of them" in note for note in plain.notes)
    penstock.close(trainer.model)
    dear = [Dear(nbytes=ROOM, seconds=5.0)]
    weighed(monkeypatch, Weighing(dear=dear, part=Part(compute_s=10.0, drive_s=0.0, weight_byte_s=0.0)))
    trainer, reference = prepare(tmp_path / "run", host, **options), Reference(CASE)
    try:
        for step in range(CASE.steps):
            for each in (reference, trainer):
                each.backward(language(each.model, step))
                each.step()
        assert differences(reference.state(), trainer.state()) == []
        plan, held = trainer.model.penstock.plan, keeper_of(trainer).plan
        assert plan.disk_nbytes_per_sweep > plain.disk_nbytes_per_sweep
        assert plan.host_nbytes <= host
        assert any(note.startswith("room: activations have 128 KiB before weights") for note in plan.notes)
        assert held is not None
        saves = trainer.optimizer._settings.saves
        assert saves is not None
        assert saves.told() in plan.notes
        assert held.saved_nbytes == saves.layers_nbytes  # what was counted before is what layers have saved
        assert held.placement.nbytes_at("keep") > ROOM // 2
    finally:
        penstock.close(trainer.model)
