"""Chrome's trace format: gzipped JSON that chrome://tracing and Perfetto's viewer open.

Slices ("X") of one track must nest, and requests to a disk do not. So only spans of compute lanes and steps are slices;
transfers and waits are pairs of asynchronous begins and ends ("b", "e"), matched by category and id.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final

import numpy as np

from ..profile import Columns, Profile
from ..schema import Cause, Compute, Gauge, Link, Mark, MarkKind, Meter, Phase, Step, Transfer, Wait
from .labels import block_label, enum_label, module_label
from .lanes import nesting
from .levels import levels

_PID: Final = 1
_ENERGY: Final = (Meter.ENERGY_CPU, Meter.ENERGY_DEVICE)

Event = dict[str, Any]
Timed = tuple[int, Event]
"""Nanoseconds, and an event without its timestamp."""


def write_chrome(profile: Profile, file: BinaryIO) -> None:
    """Write the profile as gzipped Chrome JSON, in order of time. Times are microseconds since the first record."""
    origin = profile.span()[0]
    events: list[Timed] = []
    names: list[Event] = [_named("process_name", " ".join(profile.header.argv) or "penstock")]
    for make in (_slices, _requests, _counters, _marks):
        events += make(profile, names)
    events.sort(key=lambda timed: timed[0])  # stable: of one instant, outer slices stay before inner ones
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as packed:
        packed.write(b'{"displayTimeUnit":"ms","otherData":')
        packed.write(_json(_about(profile)))
        packed.write(b',"traceEvents":[\n')
        packed.write(b",\n".join(map(_json, names)))
        for at, event in events:
            event["ts"] = (at - origin) / 1000
            packed.write(b",\n" + _json(event))
        packed.write(b"\n]}\n")


def _about(profile: Profile) -> dict[str, object]:
    header, footer = profile.header, profile.footer
    return {
        "run": header.run,
        "level": header.level,
        "emulated": header.emulated,
        "versions": header.versions,
        "machine": header.machine,
        "recorded": footer.recorded,
        "dropped": footer.dropped,
        "problems": list(profile.problems),
    }


def _slices(profile: Profile, names: list[Event]) -> Iterator[Timed]:
    tid = 1
    steps = profile[Step]
    phase = steps.phase.tolist()
    yield from _tracks(
        steps,
        names,
        tid,
        "steps",
        lambda row: {
            "name": profile.string(phase[row]) or "step",
            "cat": "step",
            "args": {"step": int(steps.id[row]), "tokens": int(steps.tokens[row])},
        },
    )
    compute = profile[Compute]
    for lane in np.unique(compute.lane).tolist():
        tid += 100
        part = compute.where(compute.lane == lane)
        yield from _tracks(part, names, tid, f"compute {lane}", _compute_event(profile, part))


def _compute_event(profile: Profile, part: Columns) -> Callable[[int], Event]:
    modules, phases = part.module.tolist(), part.phase.tolist()
    return lambda row: {"name": module_label(profile, modules[row]), "cat": enum_label(Phase, phases[row])}


def _tracks(spans: Columns, names: list[Event], tid: int, name: str, event: Callable[[int], Event]) -> Iterator[Timed]:
    """Slices of one lane; those that cross others go to tracks beside it."""
    starts, ends = spans.start.tolist(), spans.end.tolist()
    for beside, rows in enumerate(nesting(spans.start, spans.end)):
        names.append(_named("thread_name", name if not beside else f"{name} (crossing {beside})", tid + beside))
        names.append(_named("thread_sort_index", tid + beside, tid + beside))
        for row in rows:
            duration = max(ends[row] - starts[row], 0) / 1000
            yield starts[row], {"ph": "X", "pid": _PID, "tid": tid + beside, "dur": duration, **event(row)}


def _requests(profile: Profile, names: list[Event]) -> Iterator[Timed]:
    number = 0
    for row in profile[Transfer].rows():
        link = enum_label(Link, row["link"])
        about = {
            "block": block_label(profile, row["block"]),
            "nbytes": row["nbytes"],
            "cause": enum_label(Cause, row["cause"]),
            "transfer": row["id"],
            "parent": row["parent"],
            "queued_us": (row["start"] - row["issued"]) / 1000,
            "failed": row["failed"],
        }
        number += 1
        yield from _pair(link, number, row["start"], row["end"], about)
    for row in profile[Wait].rows():
        about = {"block": block_label(profile, row["block"]), "module": module_label(profile, row["module"])}
        number += 1
        yield from _pair("wait", number, row["needed"], row["ready"], about)


def _pair(category: str, number: int, start: int, end: int, about: Event) -> Iterator[Timed]:
    # Viewers make a track of all pairs of one name. Blocks are hundreds, so the name is the link's.
    common = {"name": category, "cat": category, "id": f"0x{number:x}", "pid": _PID, "tid": 0}
    yield start, {"ph": "b", **common, "args": about}
    yield max(start, end), {"ph": "e", **common}


def _counters(profile: Profile, names: list[Event]) -> Iterator[Timed]:
    for level in levels(profile):
        track = f"{level.tier.name.lower()} {level.category.name.lower()}"
        yield from _counter(track, level.at.tolist(), level.nbytes.tolist(), "nbytes")
    gauges = profile[Gauge]
    for meter in Meter:
        part = gauges.where(gauges.meter == meter)
        unit = "microjoules" if meter in _ENERGY else "nbytes"
        yield from _counter(meter.name.lower(), part.at.tolist(), part.value.tolist(), unit)


def _counter(name: str, at: Iterable[int], values: Iterable[int], unit: str) -> Iterator[Timed]:
    for instant, value in zip(at, values, strict=True):
        yield instant, {"ph": "C", "pid": _PID, "tid": 0, "name": name, "args": {unit: value}}


def _marks(profile: Profile, names: list[Event]) -> Iterator[Timed]:
    for row in profile[Mark].rows():
        about = {"block": block_label(profile, row["block"]), "text": profile.string(row["text"])}
        kind = enum_label(MarkKind, row["kind"])
        yield row["at"], {"ph": "i", "s": "p", "pid": _PID, "tid": 0, "name": kind, "cat": "mark", "args": about}


def _named(kind: str, value: str | int, tid: int = 0) -> Event:
    key = "sort_index" if kind.endswith("sort_index") else "name"
    return {"ph": "M", "pid": _PID, "tid": tid, "name": kind, "args": {key: value}}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
