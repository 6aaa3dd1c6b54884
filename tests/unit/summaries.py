"""Summaries made by hand, and fakes of what computes them: tests of the command line need neither files nor metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from penstock.memory.errors import PenstockError
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.summary import (
    Energy,
    Idle,
    LinkUse,
    MemoryRow,
    ModuleUse,
    PrefetchUse,
    Summary,
    TierPeak,
)

MIB = 2**20
MS = 1_000_000

DISK = LinkUse(
    link="DISK_READ",
    transfers=20,
    nbytes=200 * MIB,
    busy_ns=200 * MS,
    overlap=0.6,
    exposed_ns=80 * MS,
    bandwidth=200 * MIB / 0.2,
    peak=1.25 * 2**30,
    efficiency=0.78,
    amplification=5.0,
)
HOST = TierPeak(
    tier="HOST",
    at_ns=1,
    nbytes=220 * MIB,
    categories=(MemoryRow(name="BASELINE", nbytes=190 * MIB), MemoryRow(name="ARENA", nbytes=20 * MIB)),
    modules=(MemoryRow(name="layers.0", nbytes=10 * MIB),),
    unaccounted_nbytes=10 * MIB,
    named=0.955,
    capacity_nbytes=1024 * MIB,
    budget_nbytes=512 * MIB,
    fragmentation_nbytes=None,
)


def module(path: str, **changes: Any) -> ModuleUse:
    values: dict[str, Any] = {
        "path": path,
        "kind": "Layer",
        "calls": 5,
        "total_ns": 30 * MS,
        "self_ns": 30 * MS,
        "forward_ns": 30 * MS,
        "backward_ns": 0,
        "optimizer_ns": 0,
        "waited_ns": 20 * MS,
        "moved_nbytes": {"DISK_READ": 50 * MIB},
        "peak_nbytes": {"WEIGHT": 10 * MIB},
    }
    return ModuleUse(**{**values, **changes})


def summary(**changes: Any) -> Summary:
    """A run of five steps of 40 ms, which the disk binds."""
    values: dict[str, Any] = {
        "window_ns": (40 * MS, 240 * MS),
        "steps": 5,
        "step_ns": 40 * MS,
        "tokens": 5,
        "tokens_per_s": 25.0,
        "compute_ns": 120 * MS,
        "bubble": 0.4,
        "idle": Idle(disk=60 * MS, host=15 * MS, other=5 * MS),
        "links": (DISK,),
        "bound_ns": 160 * MS,
        "distance": 1.25,
        "binds": "DISK_READ",
        "prefetch": PrefetchUse(
            uses=20,
            on_time=0.9,
            streamed_uses=20,
            streamed_on_time=0.9,
            wasted=0.0,
            median_lead_ns=12 * MS,
            early_byte_seconds=1.5 * MIB,
            waited_ns=80 * MS,
        ),
        "peaks": (HOST,),
        "leaks": (),
        "modules": (module("layers.1", waited_ns=25 * MS), module("layers.0")),
        "energy": Energy(cpu_j=None, device_j=None, per_token_j=None),
        "recorded": 100,
        "dropped": 0,
        "overhead": 0.004,
        "tklqt_ns": None,
        "verdict": "disk-bound: 75% of idle time waits on reads",
    }
    return Summary(**{**values, **changes})


def without_figures() -> Summary:
    """A run in which nothing happened."""
    return summary(
        steps=0,
        step_ns=None,
        tokens=0,
        tokens_per_s=None,
        compute_ns=0,
        bubble=None,
        idle=Idle(),
        links=(),
        bound_ns=None,
        distance=None,
        binds="",
        prefetch=msgspec.structs.replace(
            summary().prefetch, uses=0, on_time=None, streamed_uses=0, streamed_on_time=None, median_lead_ns=None
        ),
        peaks=(),
        modules=(),
        recorded=0,
        overhead=None,
        verdict="nothing was recorded",
    )


class Recordings:
    """Stands in for reader, metrics, bubble and report: profiles by name of file, and their figures."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._known: dict[str, tuple[Profile, Summary]] = {}
        self.parts: list[Profile | None] = []
        """What `follow` finds, one after another; nothing more after the last."""
        self.reports: list[dict[str, Any]] = []
        fakes: Mapping[str, Mapping[str, Any]] = {
            "reader": {"read_profile": self._read, "follow": self._follow},
            "metrics": {"summarise": self._summarise},
            "bubble": {"idle_by_step": lambda profile: [(0, Idle(disk=1))]},
        }
        for name, contents in fakes.items():
            fake = ModuleType(f"penstock.runtime.profiler.{name}")
            fake.__dict__.update(contents)
            patch.setitem(sys.modules, fake.__name__, fake)
        patch.setattr("penstock.report.build", self._build, raising=False)

    def add(self, path: Path, profile: Profile, figures: Summary) -> str:
        self._known[str(path)] = (profile, figures)
        return str(path)

    def _read(self, path: Path) -> Profile:
        if str(path) not in self._known:
            raise PenstockError(f"{path} is no profile")
        return self._known[str(path)][0]

    def _follow(self, path: Path, offset: int) -> tuple[Profile | None, int]:
        return (self.parts.pop(0), offset + 1) if self.parts else (None, offset)

    def _summarise(self, profile: Profile) -> Summary:
        return next(figures for known, figures in self._known.values() if known is profile)

    def _build(self, profile: Profile, figures: Summary, **options: Any) -> str:
        self.reports.append(options)
        return f"<p>{figures.verdict}</p>"
