"""What is to be placed: classes of like blocks, budgets and rates, and what a placement takes. No torch.

A model has many blocks and few kinds of them: 120 layers of 7 matrices are 4 or 5 classes. What a placement takes is
counted by class; only going from one processor to the other depends on where in the model the blocks are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

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
    """Computing on the CPU, while nothing else uses the host's memory."""
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
        layers: By block, the part of the model that goes to the CPU as a whole, where all of its blocks do. A block
            that is not here does by itself.
        hand_over_s: Going to the CPU and back, once: what waits, and the Python that does it.
        copying: The part of its rate that is left to the CPU while other blocks are copied.
    """

    classes: tuple[BlockClass, ...]
    device_nbytes: int
    host_nbytes: int
    rates: Rates
    weights: tuple[float, ...] = (1.0,)
    overlapped: bool = False
    layers: Mapping[int, int] = field(default_factory=dict)
    hand_over_s: float = 0.0
    copying: float = 1.0

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

    def terms(self, phase: int, *, copying: bool = True) -> dict[str, list[list[float]]]:
        """By resource: seconds of a block in a phase, by class and mode.

        Args:
            copying: Whether any block is copied: it takes from the CPU's rate then.
        """
        rows: dict[str, list[list[float]]] = {}
        for each in self.classes:
            use = each.uses[phase]
            cpu_s = use.cpu_s / (self.copying if copying else 1.0)
            for name, row in self._terms_of(each, use, cpu_s).items():
                rows.setdefault(name, []).append(row)
        return rows

    @cached_property
    def _terms(self) -> dict[bool, list[dict[str, list[list[float]]]]]:
        """By whether blocks are copied, and by phase."""
        phases = range(len(self.weights))
        return {copying: [self.terms(phase, copying=copying) for phase in phases] for copying in (False, True)}

    def _terms_of(self, each: BlockClass, use: Use, cpu_s: float) -> dict[str, list[float]]:
        rates, there = self.rates, use.on_cpu
        read, copied = use.times * each.read_nbytes, use.times * each.copied_nbytes
        on_device = [use.device_s, use.device_s, 0.0 if there else use.device_s, use.device_s]
        on_cpu = [0.0, 0.0, cpu_s if there else 0.0, 0.0]
        touched = [0.0, copied, copied, copied + read]
        found = {
            "disk": [0.0, 0.0, 0.0, read / rates.disk],
            "link": [0.0, copied / rates.link, 0.0 if there else copied / rates.link, copied / rates.link],
            "dram": [nbytes / rates.dram for nbytes in touched],
        }
        if self.overlapped:
            return {**found, "device": on_device, "cpu": on_cpu}
        return {**found, "processors": [a + b for a, b in zip(on_device, on_cpu, strict=True)]}

    def overhead_s(self, phase: int, *, hand_over_s: float = 0.0) -> list[list[float]]:
        """Seconds that come on top, by class and mode.

        Args:
            hand_over_s: What going to the CPU and back adds to each block that is computed there.
        """
        found = []
        for each in self.classes:
            use = each.uses[phase]
            streamed = use.times * self.rates.overhead_s
            found.append([0.0, streamed, use.times * hand_over_s if use.on_cpu else streamed, streamed])
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
        return {name: _dot(rows, counts) for name, rows in self._terms[self._copies(counts, phase)][phase].items()}

    def _copies(self, counts: Counts, phase: int) -> bool:
        """Whether any block is copied in a phase."""
        for each, (_, host, cpu, disk) in zip(self.classes, counts, strict=True):
            use = each.uses[phase]
            if use.times and (host or disk or (cpu and not use.on_cpu)):
                return True
        return False

    def seconds(self, counts: Counts, modes: Mapping[int, Mode] | None = None) -> float:
        """What all phases take: each as long as its busiest resource, and a little for all others.

        Args:
            counts: By class and mode.
            modes: By block: where those are. Without it going from one processor to the other costs nothing.
        """
        total = 0.0
        for phase, weight in enumerate(self.weights):
            busy = self.by_resource(counts, phase)
            longest = (1 - UNHIDDEN) * max(busy.values()) + UNHIDDEN * sum(busy.values())
            handed = 0.0 if modes is None else self.hand_over_s * self.hand_overs(modes, phase)
            total += weight * (longest + _dot(self.overhead_s(phase), counts) + handed)
        return total

    def hand_overs(self, modes: Mapping[int, Mode], phase: int) -> float:
        """How often a phase goes to the CPU: once per layer that is there as a whole, else once per block."""
        blocks: dict[int, list[float]] = defaultdict(list)
        """By layer that has any there: how often each of those is used."""
        alone, lost = 0.0, set[int]()
        for each in self.classes:
            use = each.uses[phase]
            for block in each.blocks:
                layer = self.layers.get(block)
                if not use.on_cpu or modes[block] != "cpu":
                    lost |= set() if layer is None or not use.times else {layer}
                elif layer is None:
                    alone += use.times
                else:
                    blocks[layer].append(use.times)
        return alone + sum(sum(times) if layer in lost else max(times) for layer, times in blocks.items())


def _dot(rows: Sequence[Sequence[float]], counts: Counts) -> float:
    return sum(
        value * count for row, each in zip(rows, counts, strict=True) for value, count in zip(row, each, strict=True)
    )
