"""Rooms for activations that tests choose, whatever the budgets of a model are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest

from penstock.runtime.activations import keeper, records
from penstock.runtime.training import activations

ROOMS: Final[dict[str, tuple[int, int, int]]] = {
    "disk": (0, 0, 64 << 10),
    "host": (0, 8 << 20, 0),
    "mixed": (20 << 10, 44 << 10, 64 << 10),
    "kept": (100 << 10, 0, 0),
}
"""Bytes that are kept, that go to host memory beside a device apart, and of a buffer on the way to disk."""


def set_room(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have runs that are prepared from now on use one of `ROOMS`."""
    kept, host, buffer = ROOMS[name]

    def room(machinery: Any, *_: Any) -> activations.ActivationRoom:
        beside = host if machinery.device.separate else 0
        return activations.ActivationRoom(kept_nbytes=kept, host_nbytes=beside, buffer_nbytes=buffer)

    monkeypatch.setattr(activations, "room_for_activations", room)


def slow_processor(monkeypatch: pytest.MonkeyPatch, times: float = 1e4) -> None:
    """Have making again look so slow that whatever has room is held: what is measured of small models is chance."""
    plain = records.plan_activations

    def plan(found: Any, measured: records.Measured, machine: records.Machine) -> records.ActivationPlan:
        slow = {kind: replace(each, seconds=each.seconds * times) for kind, each in measured.spent.items()}
        return plain(found, records.Measured(spent=slow), machine)

    monkeypatch.setattr(keeper, "plan_activations", plan)
