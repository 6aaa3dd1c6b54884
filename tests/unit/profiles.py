"""Profiles made by hand: small enough to check every figure on paper, or of any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import (
    Block,
    Category,
    Cause,
    Compute,
    Footer,
    Gauge,
    Header,
    Link,
    Memory,
    Meter,
    Module,
    Phase,
    Record,
    Step,
    Storage,
    Tier,
    Transfer,
    Use,
    Wait,
)

MIB = 2**20


def header(**changes: Any) -> Header:
    """A header with made-up but complete fields."""
    values: dict[str, Any] = {
        "run": "0123456789abcdef",
        "level": "light",
        "began_ns": 0,
        "began_unix_s": 1_750_000_000.0,
        "argv": ("train.py", "--fast"),
        "versions": {"penstock": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "machine": {"host": "somewhere", "cores": "2"},
        "capacities": {"HOST": 1024 * MIB},
        "budgets": {"HOST": 512 * MIB},
        "peaks": {"DISK_READ": 1e9},
    }
    return Header(**{**values, **changes})


def footer(**changes: Any) -> Footer:
    """The footer of a run that ended in order."""
    values: dict[str, Any] = {"written_ns": 0, "recorded": 0, "dropped": 0, "own_ns": 0, "last": True}
    return Footer(**{**values, **changes})


def profile_of(records: Iterable[Record], **changes: Any) -> Profile:
    """A profile of these records, with tables for four layers of a model and a block for each."""
    items = list(records)
    tables: dict[str, Any] = {
        "modules": {
            0: Module(path="", kind="Model", parent=-1),
            **{i + 1: Module(path=f"layers.{i}", kind="Layer", parent=0) for i in range(4)},
        },
        "blocks": {i: Block(name=f"layers.{i}", nbytes=10 * MIB, home=Tier.DISK, module=i + 1) for i in range(4)},
        "storages": {
            i: Storage(
                names=(f"layers.{i}.weight",),
                nbytes=10 * MIB,
                dtype="bfloat16",
                shape=(1280, 4096),
                category=Category.WEIGHT,
                tier=Tier.HOST,
                module=i + 1,
            )
            for i in range(4)
        },
        "strings": {0: "decode", 1: "prefill"},
    }
    tables.update({name: changes.pop(name) for name in tuple(changes) if name in tables})
    made = changes.pop("header", None) or header(**changes)
    return Profile.of(made, footer(recorded=len(items)), items, **tables)


def streamed(steps: int = 6, *, read_ns: int = 10_000_000, compute_ns: int = 6_000_000, layers: int = 4) -> Profile:
    """A streamed model: in each step every layer is read (one after another, one ahead of its use) and computes.

    With the default times the disk binds: layers wait 4 ms each once the pipe is full.
    """
    records: list[Record] = []
    disk_free = now = 0
    number = 0
    issued_from = [0, 0]  # two slots: a read may be decided when the block before the last has computed
    for step in range(steps):
        began = now
        for layer in range(layers):
            issued = issued_from[number % 2]
            start = max(issued, disk_free)
            ready = disk_free = start + read_ns
            cause = Cause.PREFETCH if issued < now or not number else Cause.DEMAND
            records.append(
                Transfer(
                    id=number,
                    block=layer,
                    link=Link.DISK_READ,
                    nbytes=10 * MIB,
                    cause=cause,
                    issued=issued,
                    start=start,
                    end=ready,
                )
            )
            records.append(Use(block=layer, at=now, ready=ready, issued=issued, module=layer + 1))
            if ready > now:
                records.append(Wait(block=layer, needed=now, ready=ready, module=layer + 1))
                now = ready
            end = now + compute_ns
            records.append(Compute(module=layer + 1, phase=Phase.FORWARD, start=now, end=end, depth=1))
            now = end
            issued_from[number % 2] = now
            number += 1
        records.append(Compute(module=0, phase=Phase.FORWARD, start=began, end=now))
        records.append(Step(id=step, phase=0 if step else 1, start=began, end=now, tokens=1))
        records.append(Gauge(at=now, meter=Meter.HOST_RSS, value=220 * MIB))
    records.append(Memory(at=0, tier=Tier.HOST, category=Category.BASELINE, nbytes=200 * MIB))
    records.append(Memory(at=0, tier=Tier.HOST, category=Category.ARENA, nbytes=20 * MIB))
    return profile_of(records)
