"""Which blocks live where, and which processor computes them: a small integer program over classes of like blocks.

A model has many blocks and few kinds of them: 120 layers of 7 matrices are 4 or 5 classes. The program counts how many
blocks of a class get each mode; their positions are spread evenly afterwards. It is solved by HiGHS. COSMA
(arXiv 2311.18246) schedules operators the same way, one by one; FlexGen (arXiv 2303.06865) solves a linear program over
percentages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np

Mode = Literal["device", "host", "cpu", "disk"]
"""device: stays where it is computed. host: copied to the device for every use. cpu: stays on the host and is computed
there, where that was found to be cheaper. disk: read, and copied, for every use."""
MODES: Final[tuple[Mode, ...]] = ("device", "host", "cpu", "disk")


UNHIDDEN: Final = 0.05
"""The part of a resource's work that shows, though another one binds: the first block of a ring, the last of a call.
Without it, a disk that is read for nothing would cost nothing as long as the link binds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a block takes in one phase (a prompt, a token), all its uses together."""

    device_s: float
    """Computing on the device."""
    cpu_s: float = 0.0
    """Computing on the CPU, inputs and results carried there and back; `moves_s` of mode cpu."""
    on_cpu: bool = False
    """Whether mode cpu computes this phase on the CPU; it copies the block to the device otherwise."""
    times: float = 1.0
    """How often it is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockClass:
    """Blocks that are alike."""

    blocks: tuple[int, ...]
    """Ids, in the order of use."""
    front_nbytes: int
    """Of its slot on the device."""
    host_nbytes: int
    """Of its slot on the host."""
    read_nbytes: int
    copied_nbytes: int
    uses: tuple[Use, ...]
    """By phase."""
    modes: frozenset[Mode] = frozenset(MODES)
    """Those that it may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Bytes per second."""

    disk: float
    link: float
    dram: float = math.inf
    """Of the host's memory: reads write it, copies read it, products on the CPU read it."""
    overhead_s: float = 1e-4
    """Of every streamed block, besides its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rings:
    """Slots that streamed blocks pass through."""

    front_slots: int
    front_slot_nbytes: int
    back_slots: int
    back_slot_nbytes: int

    @property
    def front_nbytes(self) -> int:
        """Bytes on the device."""
        return self.front_slots * self.front_slot_nbytes

    @property
    def back_nbytes(self) -> int:
        """Bytes on the host."""
        return self.back_slots * self.back_slot_nbytes


Counts = tuple[tuple[int, ...], ...]
"""By class and mode, in the order of `MODES`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be placed.

    Args:
        weights: How often each phase occurs.
        overlapped: Whether both processors work at once (two sub-batches alternate), or one after the other.
    """

    classes: tuple[BlockClass, ...]
    device_nbytes: int
    host_nbytes: int
    rates: Rates
    weights: tuple[float, ...] = (1.0,)
    overlapped: bool = False

    def allowed(self, rings: Rings) -> list[list[bool]]:
        """By class and mode, whether such a block may have it: what is streamed must fit the slots."""
        found = []
        for each in self.classes:
            front = rings.front_slots > 0 and each.front_nbytes <= rings.front_slot_nbytes
            back = rings.back_slots > 0 and each.host_nbytes <= rings.back_slot_nbytes
            # What the CPU computes is copied for calls of many rows, so that it must fit a slot, too.
            fits = {"device": back, "host": front, "cpu": front, "disk": front and back}
            found.append([mode in each.modes and fits[mode] for mode in MODES])
        return found

    @cached_property
    def terms(self) -> list[dict[str, list[list[float]]]]:
        """By phase and resource: seconds of a block, by class and mode."""
        found = []
        for phase in range(len(self.weights)):
            rows: dict[str, list[list[float]]] = {}
            for each in self.classes:
                for name, row in self._terms_of(each, each.uses[phase]).items():
                    rows.setdefault(name, []).append(row)
            found.append(rows)
        return found

    def _terms_of(self, each: BlockClass, use: Use) -> dict[str, list[float]]:
        rates, there = self.rates, use.on_cpu
        read, copied = use.times * each.read_nbytes, use.times * each.copied_nbytes
        on_device = [use.device_s, use.device_s, 0.0 if there else use.device_s, use.device_s]
        on_cpu = [0.0, 0.0, use.cpu_s if there else 0.0, 0.0]
        touched = [0.0, copied, copied, copied + read]
        found = {
            "disk": [0.0, 0.0, 0.0, read / rates.disk],
            "link": [0.0, copied / rates.link, 0.0 if there else copied / rates.link, copied / rates.link],
            "dram": [nbytes / rates.dram for nbytes in touched],
        }
        if self.overlapped:
            return {**found, "device": on_device, "cpu": on_cpu}
        return {**found, "processors": [a + b for a, b in zip(on_device, on_cpu, strict=True)]}

    def overhead_s(self, phase: int) -> list[list[float]]:
        """Seconds that come on top, by class and mode."""
        found = []
        for each in self.classes:
            use = each.uses[phase]
            streamed = use.times * self.rates.overhead_s
            found.append([0.0, streamed, 0.0 if use.on_cpu else streamed, streamed])
        return found

    def fits(self, counts: Counts, rings: Rings) -> bool:
        """Whether such a placement is possible."""
        if rings.front_nbytes > self.device_nbytes or rings.back_nbytes > self.host_nbytes:
            return False
        device, host = rings.front_nbytes, rings.back_nbytes
        for each, allowed, row in zip(self.classes, self.allowed(rings), counts, strict=True):
            if any(count and not may for count, may in zip(row, allowed, strict=True)):
                return False
            device += row[0] * each.front_nbytes
            host += (row[1] + row[2]) * each.host_nbytes
        return device <= self.device_nbytes and host <= self.host_nbytes

    def by_resource(self, counts: Counts, phase: int) -> dict[str, float]:
        """Seconds that each resource is busy in one phase."""
        return {name: _dot(rows, counts) for name, rows in self.terms[phase].items()}

    def seconds(self, counts: Counts) -> float:
        """What all phases take: each as long as its busiest resource, and a little for all others."""
        total = 0.0
        for phase, weight in enumerate(self.weights):
            busy = self.by_resource(counts, phase)
            longest = (1 - UNHIDDEN) * max(busy.values()) + UNHIDDEN * sum(busy.values())
            total += weight * (longest + _dot(self.overhead_s(phase), counts))
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A solution."""

    modes: Mapping[int, Mode]
    """By block."""
    rings: Rings
    seconds: float
    """Of all phases, weighted."""
    busy_s: tuple[Mapping[str, float], ...] = field(default=())
    """By phase and resource."""


def place(problem: Problem, choices: Iterable[Rings]) -> Placement | None:
    """The best placement over all choices of rings; None where none fits."""
    best: tuple[float, Counts, Rings] | None = None
    for rings in choices:
        counts = _solve(problem, rings)
        for found in [counts, *(heuristic(problem, rings) for heuristic in HEURISTICS.values())]:
            if found is None or not problem.fits(found, rings):
                continue
            seconds = problem.seconds(found)
            if best is None or seconds < best[0] * (1 - 1e-9):
                best = seconds, found, rings
    if best is None:
        return None
    seconds, counts, rings = best
    return Placement(
        modes=spread(problem.classes, counts),
        rings=rings,
        seconds=seconds,
        busy_s=tuple(problem.by_resource(counts, phase) for phase in range(len(problem.weights))),
    )


def _solve(problem: Problem, rings: Rings) -> Counts | None:
    """The integer program: counts by class and mode, and the length of each phase, which is to be small."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that most runs need not spend

    classes, phases, width = len(problem.classes), len(problem.weights), len(MODES)
    size = classes * width
    lengths = np.eye(phases)
    rows: list[np.ndarray[Any, Any]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(coefficients: Sequence[Sequence[float]], least: float, most: float, phase: int | None = None) -> None:
        length = np.zeros(phases) if phase is None else -lengths[phase]
        rows.append(np.concatenate([np.ravel(coefficients), length]))
        low.append(least)
        high.append(most)

    for number, each in enumerate(problem.classes):
        constrain([[float(row == number)] * width for row in range(classes)], len(each.blocks), len(each.blocks))
    front = [[each.front_nbytes, 0, 0, 0] for each in problem.classes]
    host = [[0, each.host_nbytes, each.host_nbytes, 0] for each in problem.classes]
    constrain(front, -np.inf, problem.device_nbytes - rings.front_nbytes)
    constrain(host, -np.inf, problem.host_nbytes - rings.back_nbytes)
    for phase in range(phases):
        for coefficients in problem.terms[phase].values():
            constrain(coefficients, -np.inf, 0, phase)
    costs = np.zeros(size)
    for phase, weight in enumerate(problem.weights):
        costs += weight * np.ravel(problem.overhead_s(phase))
        costs += weight * UNHIDDEN * sum(np.ravel(each) for each in problem.terms[phase].values())
    counts = [len(each.blocks) if may else 0 for each, row in zip(problem.classes, problem.allowed(rings), strict=True)
              for may in row]  # fmt: skip
    found = milp(
        np.concatenate([costs, (1 - UNHIDDEN) * np.array(problem.weights)]),
        integrality=[1] * size + [0] * phases,
        bounds=Bounds(0, [*counts, *[np.inf] * phases]),
        constraints=LinearConstraint(np.array(rows), low, high),
        options={"mip_rel_gap": 1e-6, "time_limit": 0.5},
    )
    if found.x is None:
        return None
    whole = np.rint(found.x[:size]).astype(int).reshape(classes, width)
    return tuple(tuple(int(count) for count in row) for row in whole)


# --- rules that others go by; a plan is never worse -----------------------------------------------------------------


def all_streamed(problem: Problem, rings: Rings) -> Counts:
    """Nothing stays anywhere (ZeRO-Inference)."""
    return _filled(problem, rings, ("disk", "host", "device"), room=False)


def prefix(problem: Problem, rings: Rings) -> Counts:
    """The device is filled first, then the host, in the order of the blocks (accelerate)."""
    return _filled(problem, rings, ("device", "host", "disk"), room=True)


def greedy(problem: Problem, rings: Rings) -> Counts:
    """What costs most per byte when it is streamed gets the best place there is."""
    order = sorted(
        range(len(problem.classes)),
        key=lambda i: -sum(u.times for u in problem.classes[i].uses) * problem.classes[i].read_nbytes
        / max(problem.classes[i].host_nbytes, 1),
    )  # fmt: skip
    return _filled(problem, rings, ("device", "cpu", "host", "disk"), room=True, order=order)


Heuristic = Callable[[Problem, Rings], Counts]
HEURISTICS: Final[Mapping[str, Heuristic]] = {"all streamed": all_streamed, "prefix": prefix, "greedy": greedy}


def _filled(
    problem: Problem, rings: Rings, wanted: Sequence[Mode], *, room: bool, order: Sequence[int] | None = None
) -> Counts:
    device = problem.device_nbytes - rings.front_nbytes
    host = problem.host_nbytes - rings.back_nbytes
    allowed = problem.allowed(rings)
    counts = [[0] * len(MODES) for _ in problem.classes]
    for number in order or range(len(problem.classes)):
        each = problem.classes[number]
        left = len(each.blocks)
        for mode in wanted:
            place = MODES.index(mode)
            if not allowed[number][place]:
                continue
            most = left
            if mode == "device":
                most = min(left, max(device, 0) // max(each.front_nbytes, 1))
                device -= most * each.front_nbytes
            elif mode in ("host", "cpu"):
                most = min(left, max(host, 0) // max(each.host_nbytes, 1))
                host -= most * each.host_nbytes
            counts[number][place] += most
            left -= most
        if left:  # does not fit, which `fits` will say
            counts[number][MODES.index(wanted[-1])] += left
    return tuple(tuple(row) for row in counts)


# --- positions ------------------------------------------------------------------------------------------------------


def spread(classes: Iterable[BlockClass], counts: Counts) -> dict[int, Mode]:
    """Give every block a mode so that each mode is spread evenly over the blocks of a class, in their order.

    A run of streamed blocks would leave the processor waiting, a run of resident ones the drive idle. At every position
    the mode that is farthest behind its share comes next.
    """
    found: dict[int, Mode] = {}
    for each, row in zip(classes, counts, strict=True):
        given = [0] * len(MODES)
        total = len(each.blocks)
        for position, block in enumerate(each.blocks):
            behind = [row[m] * (position + 0.5) / total - given[m] if given[m] < row[m] else -math.inf
                      for m in range(len(MODES))]  # fmt: skip
            mode = behind.index(max(behind))
            given[mode] += 1
            found[block] = MODES[mode]
    return found


def _dot(rows: Sequence[Sequence[float]], counts: Counts) -> float:
    return sum(
        value * count for row, each in zip(rows, counts, strict=True) for value, count in zip(row, each, strict=True)
    )
