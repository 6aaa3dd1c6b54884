"""Which processor computes a block that stays in host memory: the CPU where it lies, or the device it is copied to.

A product of few rows is bound by the memory that its weights are read from, and so is the copy of the weights over the
link, which is slower. A product of many rows is bound by arithmetic, of which the device has more. So there is a number
of rows below which the CPU is faster, and it is worked out here from measured curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from .cost import CostModel
from .operations import Operation

ALWAYS: Final = 2**62
"""As a number of rows: calls of whatever size are computed on the CPU."""
GAIN: Final = 0.05
"""The part of its time that the CPU must save, at least, to be chosen: results are then equal to rounding only."""
MOST_ROWS: Final = 2**20
"""Rows of the largest call that is considered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A block that stays in host memory, and what a call does with it."""

    block: int
    operations: tuple[Operation, ...]
    """Of a call of one row. Each further row reads keys and values, and activations, of its own; the weights are read
    once for all rows."""
    nbytes: float
    """What is copied to the device when it computes."""
    request_nbytes: float = 0.0
    """Size of one copy; 0 if it is one."""
    row_nbytes: float = 0.0
    """Activations of one row that cross to the CPU, and as many that come back."""
    crossings: float = 2.0
    """Waits for the link: one for what goes to the CPU, one for what comes back. Less where a unit holds several
    blocks, or follows another one that is computed on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What else goes on while a block is computed."""

    copying: bool = True
    """Other blocks are copied to the device: the CPU's products and the copies share the host's memory."""
    reading: bool = False
    """Others are read from disk."""


def rows_below(
    candidate: Candidate, costs: CostModel, *, traffic: Traffic | None = None, most_rows: int = MOST_ROWS
) -> int:
    """The number of rows from which on the device is to compute the block: 0 for all calls, ALWAYS for none.

    The CPU is the faster one by GAIN or more right below it, and at every power of two and every point of a measured
    curve before.

    Args:
        candidate: The block.
        costs: Of the machine. One without a device has nothing to choose: ALWAYS.
        traffic: What else goes on; a copy of other blocks by default.
        most_rows: Of the largest call there will be.
    """
    if costs.hardware.gpu is None:
        return ALWAYS
    traffic = traffic or Traffic()
    wins = 0
    for rows in _grid(candidate, costs, most_rows):
        if not saves(candidate, costs, rows, traffic):
            return _boundary(candidate, costs, traffic, wins, rows)
        wins = rows
    return ALWAYS


def _boundary(candidate: Candidate, costs: CostModel, traffic: Traffic, wins: int, loses: int) -> int:
    """The first number of rows at which the CPU is not chosen, between one where it is and one where it is not."""
    while loses - wins > 1:
        middle = (wins + loses) // 2
        if saves(candidate, costs, middle, traffic):
            wins = middle
        else:
            loses = middle
    return loses if loses > 1 else 0


def choose(
    candidates: Iterable[Candidate], costs: CostModel, *, traffic: Traffic | None = None, most_rows: int = MOST_ROWS
) -> dict[int, int]:
    """For each block that the CPU is to compute at times: below how many rows."""
    found = {c.block: rows_below(c, costs, traffic=traffic, most_rows=most_rows) for c in candidates}
    return {block: rows for block, rows in found.items() if rows}


def saves(candidate: Candidate, costs: CostModel, rows: int, traffic: Traffic) -> bool:
    """Whether the CPU computes so many rows faster, by GAIN or more."""
    return cpu_s(candidate, costs, rows, traffic) <= (1 - GAIN) * device_s(candidate, costs, rows, traffic)


def cpu_s(candidate: Candidate, costs: CostModel, rows: int, traffic: Traffic) -> float:
    """Seconds that a call of so many rows takes on the CPU, what it holds up of other copies and reads, what
    activations take to get there and back, and the Python that hands over, included."""
    python_s = candidate.crossings * costs.lending_s
    return held_up_s(candidate, costs, rows, traffic) + crossing_s(candidate, costs, rows) + python_s


def held_up_s(candidate: Candidate, costs: CostModel, rows: int, traffic: Traffic) -> float:
    """Seconds that a call of so many rows computes on the CPU, what it holds up of other copies and reads included.

    Copies go on while the CPU computes. What they lose meanwhile to a memory that is shared is added: if the link is
    what binds, the sweep is longer by that.
    """
    sharing = costs.hardware.sharing
    left = 1.0
    held_up = 0.0
    if traffic.copying:
        left *= sharing.compute_while_copying
        held_up = max(held_up, 1 - sharing.copy_while_computing)
    if traffic.reading:
        left *= sharing.compute_while_reading
        held_up = max(held_up, 1 - sharing.read_while_computing)
    computing = costs.compute_s((at_rows(o, rows) for o in candidate.operations), "cpu") / left
    return computing * (1 + held_up)


def device_s(candidate: Candidate, costs: CostModel, rows: int, traffic: Traffic) -> float:
    """Seconds that the copy and a call of so many rows on the device take."""
    copying = costs.copy_s(candidate.nbytes, candidate.request_nbytes or max(candidate.nbytes, 1.0))
    return copying + costs.compute_s((at_rows(o, rows) for o in candidate.operations), "gpu")


def crossing_s(candidate: Candidate, costs: CostModel, rows: int) -> float:
    """Seconds that activations take to the CPU and back."""
    link = costs.hardware.link
    if link is None:
        return 0.0
    nbytes = rows * candidate.row_nbytes
    moved = costs.copy_s(nbytes, nbytes) + costs.copy_s(nbytes, nbytes, back=True) if nbytes else 0.0
    return candidate.crossings * link.latency_s + moved


def at_rows(operation: Operation, rows: int) -> Operation:
    """An operation of a call of one row, in a call of so many."""
    match operation.kind:
        case "linear":
            return msgspec.structs.replace(operation, rows=operation.rows * rows)
        case "attention" | "attention back" | "memory":
            return msgspec.structs.replace(operation, nbytes=operation.nbytes * rows)
        case "adam":
            return operation


def _grid(candidate: Candidate, costs: CostModel, most_rows: int) -> Iterator[int]:
    """Numbers of rows between which times follow powers: those of the curves, and powers of two."""
    points = {1, most_rows}
    points.update(2**power for power in range(most_rows.bit_length()))
    for processor in (costs.processor("cpu"), costs.processor("gpu")):
        for curve in processor.linear.values():
            for operation in candidate.operations:
                if operation.kind == "linear" and operation.rows > 0:
                    points.update(max(1, round(x / operation.rows)) for x in curve.x)
    return iter(sorted(rows for rows in points if 1 <= rows <= most_rows))
