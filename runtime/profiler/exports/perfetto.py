"""Perfetto's native format: track events in protobuf, gzipped. Its viewer opens it, and its trace processor queries it.

Transfers of a link are packed into lanes in which none overlap; the viewer shows the lanes of a link as one group. Hops
of one journey (disk → host → device) are joined by arrows.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import BinaryIO, Final

import numpy as np

from ..profile import Column, Columns, Profile
from ..schema import NONE, Cause, Compute, Gauge, Link, Mark, MarkKind, Meter, Phase, Step, Transfer, Wait
from .labels import block_label, enum_label, module_label
from .lanes import disjoint, edges, nesting
from .levels import levels
from .protobuf import fixed64, integer, message, text

# Numbers of fields, from perfetto/trace/*.proto.
_PACKET: Final = 1
_TIMESTAMP, _SEQUENCE, _TRACK_EVENT, _TRACK_DESCRIPTOR = 8, 10, 11, 60
_UUID, _TRACK_NAME, _PROCESS, _PARENT, _COUNTER = 1, 2, 3, 5, 8
_ANNOTATION, _EVENT_TYPE, _EVENT_TRACK, _CATEGORY, _EVENT_NAME = 4, 9, 11, 22, 23
_COUNTER_VALUE, _FLOW = 30, 47
_ANNOTATION_INT, _ANNOTATION_TEXT, _ANNOTATION_NAME = 4, 6, 10
_BEGIN, _END, _INSTANT, _VALUE = 1, 2, 3, 4
_UNIT_BYTES: Final = 3

_MOST_HOPS: Final = 16
"""A damaged file may have parents without end."""
_ROOT: Final = 1
"""The track of the process, which all others hang on."""
_OURS: Final = integer(_SEQUENCE, 1)

Timed = tuple[int, bytes]
"""Nanoseconds, and the encoded fields of a track event."""


def write_perfetto(profile: Profile, file: BinaryIO) -> None:
    """Write the profile as a gzipped Perfetto trace, in order of time. Times are nanoseconds since the first record."""
    trace = _Trace(profile)
    origin = profile.span()[0]
    events = [*_steps(trace), *_compute(trace), *_transfers(trace), *_waits(trace), *_counters(trace), *_marks(trace)]
    events.sort(key=lambda timed: timed[0])  # stable: the events of one track stay in their order
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as packed:
        packed.write(b"".join(trace.descriptors))
        for at, event in events:
            packed.write(message(_PACKET, integer(_TIMESTAMP, at - origin), _OURS, message(_TRACK_EVENT, event)))


class _Trace:
    """The tracks of a trace: numbered as they are made."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        name = " ".join(profile.header.argv) or "penstock"
        process = message(_PROCESS, integer(1, max(profile.header.pid, 1)), text(6, name))
        self.descriptors = [_descriptor(integer(_UUID, _ROOT), text(_TRACK_NAME, name), process)]

    def track(self, name: str, counter: bytes | None = None) -> int:
        """A new track; its number. Tracks of one name are shown as one group."""
        uuid = _ROOT + len(self.descriptors)
        kind = b"" if counter is None else message(_COUNTER, counter)
        self.descriptors.append(
            _descriptor(integer(_UUID, uuid), text(_TRACK_NAME, name), integer(_PARENT, _ROOT), kind)
        )
        return uuid


def _descriptor(*fields: bytes) -> bytes:
    return message(_PACKET, _OURS, message(_TRACK_DESCRIPTOR, *fields))


def _slices(
    trace: _Trace, name: str, lanes: list[list[int]], starts: Column, ends: Column, begins: list[bytes]
) -> Iterator[Timed]:
    """Begins and ends of spans, a track for each lane. `begins` are what to say of each row where it begins."""
    for rows in lanes:
        track = integer(_EVENT_TRACK, trace.track(name))
        begin, end = integer(_EVENT_TYPE, _BEGIN) + track, integer(_EVENT_TYPE, _END) + track
        for edge in edges(rows, starts, ends):
            yield edge.at, begin + begins[edge.row] if edge.begins else end


def _steps(trace: _Trace) -> Iterator[Timed]:
    steps, profile = trace.profile[Step], trace.profile
    about = [
        _called(profile.string(row["phase"]) or "step", "step")
        + _number("step", row["id"])
        + _number("tokens", row["tokens"])
        for row in steps.rows()
    ]
    yield from _slices(trace, "steps", nesting(steps.start, steps.end), steps.start, steps.end, about)


def _compute(trace: _Trace) -> Iterator[Timed]:
    compute, profile = trace.profile[Compute], trace.profile
    for lane in np.unique(compute.lane).tolist():
        part = compute.where(compute.lane == lane)
        pairs = zip(part.module.tolist(), part.phase.tolist(), strict=True)
        about = [_called(module_label(profile, module), enum_label(Phase, phase)) for module, phase in pairs]
        yield from _slices(trace, f"compute {lane}", nesting(part.start, part.end), part.start, part.end, about)


def _transfers(trace: _Trace) -> Iterator[Timed]:
    transfers, profile = trace.profile[Transfer], trace.profile
    journeys = _journeys(transfers)
    for link in Link:
        mask = transfers.link == link
        part = transfers.where(mask)
        about = [
            _called(block_label(profile, row["block"]), link.name.lower())
            + _number("nbytes", row["nbytes"])
            + _said("cause", enum_label(Cause, row["cause"]))
            + _number("queued_ns", row["start"] - row["issued"])
            + (_number("failed", 1) if row["failed"] > 0 else b"")
            + (fixed64(_FLOW, journeys[row["id"]]) if row["id"] in journeys else b"")
            for row in part.rows()
        ]
        yield from _slices(trace, link.name.lower(), disjoint(part.start, part.end), part.start, part.end, about)


def _journeys(transfers: Columns) -> dict[int, int]:
    """By id of a transfer that is one hop of several: a number that all hops of its journey share."""
    parents = dict(zip(transfers.id.tolist(), transfers.parent.tolist(), strict=True))
    found = {}
    for number, parent in parents.items():
        if parent == NONE or parent not in parents:
            continue
        first, seen = number, {number}
        while parents.get(first, NONE) != NONE and parents[first] not in seen and len(seen) < _MOST_HOPS:
            first = parents[first]
            seen.add(first)
        found.update(dict.fromkeys(seen & parents.keys(), first + 1))
    return found


def _waits(trace: _Trace) -> Iterator[Timed]:
    waits, profile = trace.profile[Wait], trace.profile
    about = [
        _called(block_label(profile, row["block"]), "wait") + _said("module", module_label(profile, row["module"]))
        for row in waits.rows()
    ]
    yield from _slices(trace, "waits", disjoint(waits.needed, waits.ready), waits.needed, waits.ready, about)


def _counters(trace: _Trace) -> Iterator[Timed]:
    for level in levels(trace.profile):
        name = f"{level.tier.name.lower()} {level.category.name.lower()}"
        yield from _counter(trace, name, integer(3, _UNIT_BYTES), level.at, level.nbytes)
    gauges = trace.profile[Gauge]
    for meter in Meter:
        part = gauges.where(gauges.meter == meter)
        energy = meter in (Meter.ENERGY_CPU, Meter.ENERGY_DEVICE)
        order = np.argsort(part.at, kind="stable")
        unit = text(6, "µJ") if energy else integer(3, _UNIT_BYTES)
        yield from _counter(trace, meter.name.lower(), unit, part.at[order], part.value[order])


def _counter(trace: _Trace, name: str, unit: bytes, at: Column, values: Column) -> Iterator[Timed]:
    if not len(at):
        return
    head = integer(_EVENT_TYPE, _VALUE) + integer(_EVENT_TRACK, trace.track(name, unit))
    for instant, value in zip(at.tolist(), values.tolist(), strict=True):
        yield instant, head + integer(_COUNTER_VALUE, value)


def _marks(trace: _Trace) -> Iterator[Timed]:
    marks = trace.profile[Mark]
    if not len(marks):
        return
    head = integer(_EVENT_TYPE, _INSTANT) + integer(_EVENT_TRACK, trace.track("marks"))
    for row in marks.rows():
        about = _said("block", block_label(trace.profile, row["block"]))
        said = trace.profile.string(row["text"])
        yield (
            row["at"],
            head + _called(enum_label(MarkKind, row["kind"]), "mark") + about + (_said("text", said) if said else b""),
        )


def _called(name: str, category: str) -> bytes:
    return text(_CATEGORY, category) + text(_EVENT_NAME, name)


def _number(name: str, value: int) -> bytes:
    return message(_ANNOTATION, text(_ANNOTATION_NAME, name), integer(_ANNOTATION_INT, value))


def _said(name: str, value: str) -> bytes:
    return message(_ANNOTATION, text(_ANNOTATION_NAME, name), text(_ANNOTATION_TEXT, value))
