"""Carries out `penstock plan --sweep`: the same work while one thing changes, as a table and a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Final

import msgspec

from ..budget import MemoryBudget
from ..memory.errors import DoesNotFitError, UsageError
from ..scheduler.hardware import Hardware
from ..sizes import format_size, parse_size
from .linechart import Line, draw
from .output import Output
from .tables import lines_of
from .view import P, View

_SIZES: Final = ("host", "device")
_COUNTS: Final = ("batch",)
MOST: Final = 9
"""Values of a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One thing, and the values that it takes."""

    name: str
    values: tuple[int, ...]

    def label(self, value: int) -> str:
        """A value for people."""
        return format_size(value) if self.name in _SIZES else str(value)


def parse_sweep(text: str) -> Sweep:
    """What "host=16GiB:128GiB" or "batch=1:64" means: from one to the other, in steps of a constant factor.

    Raises:
        UsageError: it is something else.
    """
    name, _, span = text.partition("=")
    low, colon, high = span.partition(":")
    if name not in (*_SIZES, *_COUNTS) or not colon:
        raise UsageError(f"--sweep {text!r}: write for example host=16GiB:128GiB, device=8GiB:48GiB or batch=1:64")
    if name in _SIZES:
        first, last = parse_size(low), parse_size(high)
    else:
        if not (low.isdecimal() and high.isdecimal()):
            raise UsageError(f"--sweep {text!r}: {name} is a number, for example {name}=1:64")
        first, last = int(low), int(high)
    if not 0 < first < last:
        raise UsageError(f"--sweep {text!r}: the first value must be above 0 and below the last one")
    doublings = max(1, round(log2(last / first)))
    steps = doublings if name in _COUNTS else max(1, min(MOST - 1, 2 * doublings))
    values = [round(first * (last / first) ** (step / steps)) for step in range(steps + 1)]
    return Sweep(name=name, values=tuple(dict.fromkeys(values)))


Point = tuple[int, P | None]
Foresee = Callable[[Hardware, MemoryBudget, int | None], P]
"""The forecast of a machine under a budget, at a batch; None: of the batch that was asked for."""


def sweep(foresee: Foresee[P], hardware: Hardware, budget: MemoryBudget, asked: Sweep) -> list[Point[P]]:
    """The forecast at each value; None where it does not fit."""
    found: list[Point[P]] = []
    for value in asked.values:
        batch = value if asked.name == "batch" else None
        changed = budget if batch else replace(budget, **{asked.name: value})
        try:
            found.append((value, foresee(_with_room(hardware, asked, value), changed, batch)))
        except DoesNotFitError:
            found.append((value, None))
    return found


def _with_room(hardware: Hardware, asked: Sweep, value: int) -> Hardware:
    """The machine with at least the memory that is asked about, and some to spare for the run itself."""
    if asked.name == "host":
        return msgspec.structs.replace(hardware, host_nbytes=max(hardware.host_nbytes, 2 * value))
    if asked.name == "device" and hardware.gpu is not None:
        gpu = msgspec.structs.replace(hardware.gpu, memory_nbytes=max(hardware.gpu.memory_nbytes, 2 * value))
        return msgspec.structs.replace(hardware, gpu=gpu)
    return hardware


def show_sweep(
    output: Output,
    asked: Sweep,
    points: Sequence[Point[P]],
    view: View[P],
    *,
    title: str,
    chart: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Print a sweep, and draw it where a chart is asked for; 3 where nothing fits."""
    if as_json:
        documents = [
            {asked.name: value, "fits": found is not None, **(view.document(found) if found else {})}
            for value, found in points
        ]
        output.write_json(documents)
    else:
        rows = [[asked.name, *view.columns]]
        for value, found in points:
            nothing = ["does not fit", *[""] * (len(view.columns) - 1)]
            rows.append([asked.label(value), *(nothing if found is None else view.row(found))])
        for line in lines_of(rows):
            output.data.print(line)
    if chart is not None:
        _draw(asked, points, view, title, chart, force)
        output.notes.print(f"drawn in {chart}")
    return 0 if any(found is not None for _, found in points) else 3


def _draw(asked: Sweep, points: Sequence[Point[P]], view: View[P], title: str, chart: Path, force: bool) -> None:
    there = [(value, found) for value, found in points if found is not None]
    page = draw(
        title=title,
        x_label=asked.name,
        x_text=lambda value: asked.label(round(value)),
        y_label="tokens per second",
        lines=(Line(name=view.rate, points=tuple((float(value), found.tokens_per_s) for value, found in there)),),
        marks=tuple((float(value), found.binds) for value, found in there),
    )
    if chart.exists() and not force:
        raise UsageError(f"{chart} exists. Choose another file, or replace it with --force")
    try:
        chart.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{chart} cannot be written: {error.strerror}") from error
