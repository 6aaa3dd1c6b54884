"""Budgets found by asking: what a model needs at least, and what keeps all of it resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import penstock

Place = Callable[[dict[str, int], str], Any]
"""Loads or offloads a fresh model under a budget, on a device."""

LEVELS = ("nothing", "one block", "half", "all but one")
DEVICES = {"cpu": "cpu", "emulated": "emulated:h2d=20GiB/s,d2h=20GiB/s,disk=20GiB/s"}
PLENTY = 2**30
"""A budget no model of the zoo can use up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Between what and what a budget streams, in bytes of one tier."""

    needed: int
    resident: int


def find_limits(place: Place, device: str, tier: str, others: dict[str, int]) -> Limits:
    """Ask for one byte of `tier` and read the refusal."""
    with pytest.raises(penstock.DoesNotFitError) as caught:
        place({**others, tier: 1}, DEVICES[device])
    refusal = caught.value
    assert refusal.tier == tier, refusal
    assert refusal.available_nbytes == 1
    assert refusal.resident_nbytes is not None
    assert 1 < refusal.needed_nbytes < refusal.resident_nbytes, refusal
    return Limits(needed=refusal.needed_nbytes, resident=refusal.resident_nbytes)


def find_budget(place: Place, device: str, level: str) -> dict[str, int]:
    """The budget of every tier of `device` at one of `LEVELS`."""
    if device == "cpu":
        return {"host": _pick(place, device, level, "host", {})}
    on_device = _pick(place, device, level, "device", {"host": PLENTY})
    return {"device": on_device, "host": _pick(place, device, level, "host", {"device": on_device})}


def _pick(place: Place, device: str, level: str, tier: str, others: dict[str, int]) -> int:
    limits = find_limits(place, device, tier, others)
    if level == "nothing":
        return limits.needed
    if level == "half":
        return (limits.needed + limits.resident) // 2
    if level == "all but one":
        return limits.resident - 1
    assert level == "one block", level
    model = place({**others, tier: limits.needed}, DEVICES[device])
    try:
        largest = max(block.nbytes for block in model.penstock.plan.blocks)
    finally:
        penstock.close(model)
    return min(limits.needed + int(largest), limits.resident - 1)


@contextmanager
def streamed(place: Place, *, device: str = "cpu", level: str = "nothing") -> Iterator[Any]:
    """A model under one of the budgets, closed at the end."""
    model = place(find_budget(place, device, level), DEVICES[device])
    try:
        yield model
    finally:
        penstock.close(model)
