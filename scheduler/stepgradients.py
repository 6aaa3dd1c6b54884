"""The gradients of a training step's task graph: how they leave, what backward waits for, and when they are there.

Where the CPU computes, it puts them where they are kept before it goes on. Of a device apart they are copied while
backward goes on, which waits for memory alone: of the device, where many wait for their copies, and of the ring that
they pass through where they are added up or go to disk, by a thread of its own. Norms of one pass are taken there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from .cost import CostModel
from .operations import Operation
from .schedule import Slots
from .steplanes import StepLanes
from .stepload import LoadedBlock, StepLoad

BUFFERS: Final = 4
"""That gradients on their way to disk pass through, a piece of a shard each."""
RING: Final = 1
"""Blocks that fit the ring from a device apart, more or less: it has the size of the two largest gradients."""
NORM_OPERATIONS: Final = 2
"""On each gradient: it is made fp32, and its norm taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """Gradients of a block that have left."""

    computed: int
    """The last task of the processor for them."""
    waits: Sequence[int]
    """What it waits for before it goes on."""
    there: int
    """The task with which they are in host memory; what goes to disk is in `arrived`."""


class StepGradients:
    """Those of all steps, block by block.

    Args:
        load: What a step consists of.
        cost: Of the machine.
        lanes: What tasks go to.
        unit: Elements that go to disk at a time.
    """

    def __init__(self, load: StepLoad, cost: CostModel, lanes: StepLanes, *, unit: int) -> None:
        self.arrived: dict[int, int] = {}
        """By block: the task with which its gradients are where they are kept."""
        self._load, self._cost, self._lanes, self._unit = load, cost, lanes, unit
        self._buffers = Slots(BUFFERS)
        self._ring = Slots(RING)
        self._held: deque[tuple[int, int]] = deque()
        """On a device apart: copies that have not been waited for, and bytes of each."""

    def leave(self, block: LoadedBlock, computed: int, *, first: bool, last: bool) -> Left:
        """Those of one more backward pass leave.

        Args:
            block: Whose.
            computed: The task that has made them.
            first: Whether the pass is the first of its step.
            last: Likewise.
        """
        early = last and self._load.updates == "backward"
        # the last of a sum goes into the update, where that begins at once, and not to disk
        written = 0 if early else block.spilled_read_nbytes
        moved: float = block.gradient_nbytes + (1 if first else 2) * block.kept_nbytes
        if self._load.separate:
            return self._depart(block, computed, moved, written, first=first, last=last)
        if last and not early:  # of those that leave memory the norm is taken here
            moved += block.norm_nbytes * _spilled(block)
        put = self._put(block, moved, written, self._with_sum(block, computed, first=first))
        return Left(computed=computed, waits=[put], there=put)

    def _depart(
        self, block: LoadedBlock, computed: int, moved: float, written: int, *, first: bool, last: bool
    ) -> Left:
        lanes, whole = self._lanes, first and last
        if whole:
            computed = lanes.compute("norm", self._norm_there_s(block), [computed])
        share = 1.0 if self._load.accumulate > 1 else _spilled(block) if written else 0.0
        room = self._ring.take() if share else ()
        lanes.moved("from_device", block.gradient_nbytes)
        there = lanes.copy(block.gradient_nbytes, [computed, *room], back=True)
        waits = [*room, *self._hold(there, block.gradient_nbytes)]
        self.arrived[block.id] = there
        if share:
            moved = share * moved + (block.norm_nbytes if last and not whole else 0)
            there = self._put(block, moved, written, self._with_sum(block, there, first=first))
            self._ring.use(there)
        return Left(computed=computed, waits=waits, there=there)

    def _hold(self, copy: int, nbytes: int) -> list[int]:
        """What the device waits for before it computes into memory of gradients, of which so many more are copied."""
        self._held.append((copy, nbytes))
        found = []
        while len(self._held) > 1 and sum(each for _, each in self._held) > self._load.leaving_nbytes:
            found.append(self._held.popleft()[0])
        return found

    def _norm_there_s(self, block: LoadedBlock) -> float:
        launches = NORM_OPERATIONS * block.tensors
        return self._cost.operation_s(Operation(kind="memory", nbytes=block.norm_nbytes, launches=launches), "gpu")

    def _with_sum(self, block: LoadedBlock, after: int, *, first: bool) -> list[int]:
        """What adding waits for: what has come before may have to be read."""
        if first or not block.spilled_nbytes:
            return [after]
        self._lanes.moved("gradients_read", block.spilled_read_nbytes)
        return [self._lanes.read("read gradients", block.spilled_read_nbytes, [after, self.arrived[block.id]])]

    def _put(self, block: LoadedBlock, moved: float, written: float, before: Sequence[int]) -> int:
        """They are added up, and written through a ring of buffers as far as they go to disk: the last task of the
        CPU."""
        lanes, put = self._lanes, -1
        pieces = max(1, ceil(block.elements / self._unit)) if written else 1
        seconds = lanes.memory_s(moved / pieces, max(block.tensors / pieces, 1))
        for _ in range(pieces):
            free = self._buffers.take() if written else ()
            put = lanes.cores("put", "gradients", seconds, [*before, *free])
            before = [put]
            self.arrived[block.id] = put
            if written:
                lanes.moved("gradients_written", written / pieces)
                self.arrived[block.id] = lanes.write("write gradients", written / pieces, [put])
                self._buffers.use(self.arrived[block.id])
        return put

    def settle(self, after: Sequence[int]) -> list[int]:
        """What `step()` waits for: all of them, and their norm where that is still to be taken, `after` all else."""
        self._held.clear()
        trained = self._load.trained()
        moving = [b for b in trained if b.id in self.arrived and (b.spilled_nbytes or self._load.separate)]
        there = [*after, *(self.arrived[block.id] for block in moving)]
        if self._load.separate or self._load.updates == "backward":
            return there
        kept = [(block, 1 - _spilled(block)) for block in trained]
        norm = sum(share * block.norm_nbytes for block, share in kept)
        seconds = self._lanes.memory_s(norm, NORM_OPERATIONS * sum(share * block.tensors for block, share in kept))
        return [self._lanes.cores("norm", "gradients", seconds, there)]


def _spilled(block: LoadedBlock) -> float:
    """The part of its gradients that goes to disk."""
    return block.spilled_nbytes / block.kept_nbytes
