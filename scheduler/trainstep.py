"""A step of training before it happens: penstock's own schedule as a task graph, at a machine's rates.

Weights come ahead through a ring, in forward and in backward, each of which has an order that the executor has learned
(`ringorder.py`). Backward makes the activations of each segment again before it goes back through it. Gradients leave
as they come. Blocks are updated one after the other: shards are read, changed (some on a device apart, to which they
are sent) and written, a few at a time, while the next forward waits for each block's new weights alone; or, where
updates begin in backward, while that goes on.

Resources that are shared are slowed: a drive that reads and writes, the two ways of a link, cores or a device that
compute and update. What is not in it: the first steps, in which orders are learned; the data; commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Final, Literal

from .cost import CostModel
from .ringorder import Arrival, arrivals
from .schedule import Slots
from .stepgradients import StepGradients
from .steplanes import StepLanes
from .stepload import LoadedBlock, StepLoad, StepPrediction, Traffic
from .updatework import checks_s, update_s, update_there_s

STEPS: Final = 4
"""That are simulated: the first has nothing to update, writes pile up in the next ones, the last one counts."""
PASSES: Final = 6
"""Of a step's backward passes. Where there are more, the one before the last stands for them: by then what was left of
the update has mostly been done."""
MOST_SHARDS: Final = 1500
"""Of a step. Where there are more, several are simulated as one."""
Way = Literal["forward", "again", "backward"]


def predict(load: StepLoad, cost: CostModel) -> StepPrediction:
    """How a step goes, after some like it."""
    return _Run(load, cost).predict()


def one_pass(load: StepLoad) -> Iterator[tuple[Way, int]]:
    """What a forward and its backward compute, in order: which way, and the place in `uses`."""
    places = range(len(load.uses))
    ends = {stop: start for start, stop in load.segments}
    yield from (("forward", place) for place in places)
    for place in reversed(places):
        if place + 1 in ends:
            yield from (("again", inner) for inner in range(ends[place + 1], place + 1))
        yield "backward", place


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """What of a block is updated at a time: a shard, or several that are simulated as one."""

    elements: float
    there: bool
    """Whether the device updates it."""


class _Run:
    """One simulation. Lanes are in order; a task's resource is shared with those of other lanes."""

    def __init__(self, load: StepLoad, cost: CostModel) -> None:
        self._load = load
        self._cost = cost
        self._lanes = StepLanes(cost, separate=load.separate)
        self._graph = self._lanes.graph
        self._passes = min(load.accumulate, PASSES)
        self._host_ring = Slots(max(load.host_slots, 2))
        self._buffers = Slots(load.buffers)
        self._behind = Slots(load.behind)
        self._place = 0
        """Of the next use, over all steps."""
        self._ended: list[int] = []
        """By use: the task that ends it."""
        self._gate: list[int] = []
        """What the processor waits for before it goes on."""
        self._computed = -1
        """The last of its tasks."""
        self._updated: dict[int, int] = {}
        """By block: the task after which its new weights are there."""
        self._stale: set[int] = set()
        """Blocks that stay on the device and have changed in host memory or on disk."""
        self._landed: dict[int, int] = {}
        """By block: the last write of its states. None of them is read before."""
        self._written: list[int] = []
        """What `step()` waits for: the update before it."""
        self._first_use: dict[int, int] = {}
        for index in reversed(range(len(load.uses))):
            self._first_use.update(dict.fromkeys(load.uses[index].blocks, index))
        self._coming: dict[int, list[Arrival[int]]] = {}
        """By use, over all steps: the blocks that the ring has to be brought for it."""
        self._in_vain: dict[int, list[Arrival[int]]] = {}
        """By use: what it is brought by then that is not used before it changes."""
        for each in self._arrivals():
            (self._in_vain if each.in_vain else self._coming).setdefault(each.use, []).append(each)
        elements = sum(block.elements for block in load.trained())
        self._unit = load.shard_elements * max(1, ceil(elements / load.shard_elements / MOST_SHARDS))
        self._left = StepGradients(load, cost, self._lanes, unit=self._unit)

    def predict(self) -> StepPrediction:
        load, lanes = self._load, self._lanes
        usual, times = self._passes - 2, load.accumulate - self._passes + 1
        marks: list[int] = []
        for _ in range(STEPS):
            lanes.clear()
            marks = [self._computed]
            for number in range(self._passes):
                lanes.times = times if number == usual else 1
                marks += self._one_pass(first=number == 0, last=number == self._passes - 1)
            lanes.times = 1
            marks.append(self._end_of_step())
        ended = self._graph.simulate().end
        spans = [ended[b] - (ended[a] if a >= 0 else 0.0) for a, b in pairwise(marks)]
        if self._passes > 1:
            spans[2 * usual : 2 * usual + 2] = [times * span for span in spans[2 * usual : 2 * usual + 2]]
        spans[-1] += max(0.0, self._disk_s() - sum(spans))
        return StepPrediction(
            seconds=sum(spans),
            forward_s=sum(spans[:-1:2]),
            backward_s=sum(spans[1:-1:2]),
            update_s=spans[-1],
            busy_s={name: seconds for name, seconds in lanes.busy_s.items() if seconds},
            traffic=Traffic(**lanes.nbytes),
        )

    def _disk_s(self) -> float:
        """What a step keeps drives busy for, at least: where writes pile up over more steps than are simulated, later
        ones wait for them."""
        mixed = min((drive.mixed for drive in self._cost.hardware.drives), default=1.0)
        return self._lanes.busy_s["disk"] / max(1.0, mixed)

    # --- forward and backward -------------------------------------------------------------------------------------

    def _arrivals(self) -> list[Arrival[int]]:
        """What the ring is brought, over all steps and what is read ahead for the one after the last."""
        load = self._load
        order: list[Sequence[int]] = []
        changes: dict[int, Collection[int]] = {}
        for _ in range(STEPS + 1):
            for number in range(self._passes):
                for way, place in one_pass(load):
                    asked = self._asked(way, place)
                    order.append([block for block in asked if self._passes_through(load.blocks[block])])
                    if load.updates == "backward" and way == "backward" and number == self._passes - 1:
                        changes[len(order) - 1] = self._whole_at(place)
            if load.updates == "step":
                changes[len(order) - 1] = [block.id for block in load.trained()]
        return arrivals(order, max([load.slots, *(len(use.blocks) + 1 for use in load.uses)]), changes=changes)

    def _whole_at(self, place: int) -> list[int]:
        """Trained blocks whose gradients are whole when backward has gone back to this place."""
        blocks = (self._load.blocks[number] for number in self._load.uses[place].blocks)
        return [block.id for block in blocks if block.elements and self._first_use[block.id] == place]

    def _asked(self, way: Way, place: int) -> tuple[int, ...]:
        """Blocks that are lent: backward asks only for those that products have saved."""
        use = self._load.uses[place]
        return use.blocks if way != "backward" or use.saved else ()

    def _passes_through(self, block: LoadedBlock) -> bool:
        return block.home == "disk" or (self._load.separate and block.home == "host")

    def _one_pass(self, *, first: bool, last: bool) -> list[int]:
        """A forward and its backward: the tasks that end them."""
        uses, forward = self._load.uses, self._computed
        for way, place in one_pass(self._load):
            use = uses[place]
            seconds = {"forward": use.forward_s, "again": use.again_s, "backward": use.backward_s}[way]
            after = [*self._gate, *self._brought(way, place)]
            self._computed = self._lanes.compute(way, seconds, after)
            self._gate = []
            self._ended.append(self._computed)
            for each in self._in_vain.get(self._place, ()):
                self._bring_for(each)
            self._place += 1
            if way == "forward":
                forward = self._computed
            elif way == "backward":
                self._gradients(place, first=first, last=last)
        small = self._load.blocks.get(self._load.small)
        if small is not None and small.id not in self._first_use:
            self._gradient(small, first=first, last=last)
        self._computed = self._graph.add("pass", after=[self._computed, *self._gate])
        self._gate = [self._computed]
        return [forward, self._computed]

    def _brought(self, way: Way, place: int) -> Iterator[int]:
        """What a use of blocks waits for: their new weights, and that they are there."""
        for number in self._asked(way, place):
            if number in self._updated:
                yield self._updated[number]
            if number in self._stale:
                self._stale.discard(number)
                yield self._bring(self._load.blocks[number], [])
        for each in self._coming.get(self._place, ()):
            yield self._bring_for(each)

    def _bring_for(self, arrival: Arrival[int]) -> int:
        return self._bring(
            self._load.blocks[arrival.block], [] if arrival.after is None else [self._ended[arrival.after]]
        )

    def _bring(self, block: LoadedBlock, slot: Sequence[int]) -> int:
        """Read and copy its weights; `slot` is what its slot waits for."""
        lanes, new = self._lanes, [self._updated[block.id]] if block.id in self._updated else []
        if not self._load.separate:
            lanes.moved("weights_read", block.read_nbytes)
            return lanes.read("read", block.read_nbytes, [*new, *slot])
        lanes.moved("to_device", block.weights_nbytes)
        if block.in_memory:
            return lanes.copy(block.weights_nbytes, [*new, *slot])
        lanes.moved("weights_read", block.read_nbytes)
        read = lanes.read("read", block.read_nbytes, [*new, *self._host_ring.take()])
        copied = lanes.copy(block.weights_nbytes, [read, *slot])
        self._host_ring.use(copied)
        return copied

    # --- gradients and updates ------------------------------------------------------------------------------------

    def _gradients(self, place: int, *, first: bool, last: bool) -> None:
        """Those leave that are whole when backward has gone back to this place."""
        for number in self._whole_at(place):
            self._gradient(self._load.blocks[number], first=first, last=last)

    def _gradient(self, block: LoadedBlock, *, first: bool, last: bool) -> None:
        """A block's gradients leave, and begin its update where backward does that."""
        if not block.elements:
            return
        left = self._left.leave(block, self._computed, first=first, last=last)
        self._computed = left.computed
        self._gate += left.waits
        if last and self._load.updates == "backward" and block.id != self._load.small:
            submitted = self._graph.add("submit", after=[left.computed, *left.waits, *self._behind.take()])
            self._gate.append(submitted)
            self._update(block, self._graph.add("there", after=[submitted, left.there]))
            self._behind.use(self._updated[block.id])

    def _end_of_step(self) -> int:
        """`step()`: the last task before it returns."""
        load = self._load
        early = load.updates == "backward"
        after = [self._computed, *self._gate]
        if not early:  # what was changed before is there
            after += self._written
            self._written = []
        begun = self._graph.add("step", after=self._left.settle(after))
        small = load.blocks.get(load.small)
        gate = [begun]
        if small is not None and small.elements:
            self._update(small, begun, lane="update at once")
            gate.append(self._updated[small.id])
        if not early:
            for block in sorted(load.trained(), key=lambda each: each.id):
                if block.id != load.small and block.id in self._first_use:
                    self._update(block, begun)
        self._computed = self._graph.add("returned", after=gate)
        self._gate = [self._computed]
        return self._computed

    def _update(self, block: LoadedBlock, begun: int, *, lane: str = "update") -> None:
        """Its shards are read, changed on either processor and written, then its weights."""
        load, lanes = self._load, self._lanes
        units = self._units(block)
        states = block.states_moved_nbytes / len(units)
        spilled = block.spilled_read_nbytes / len(units) if load.updates == "step" else 0.0
        done, changed = begun, {True: begun, False: begun}
        for unit in units:
            slot = self._buffers.take() if lane == "update" else ()
            there = [begun, *slot]
            if states or spilled:
                lanes.moved("states_read", states)
                lanes.moved("gradients_read", spilled)
                after = [*there, *([self._left.arrived[block.id]] if spilled else [])]
                after += [self._landed[block.id]] if block.id in self._landed else []
                there.append(lanes.read("read states", states + spilled, after))
            if unit.there:
                done = self._update_there(block, unit, there, checked_nbytes=states)
            else:
                done = lanes.cores(lane, lane, self._update_s(block, unit, checked_nbytes=states), there)
            changed[unit.there] = done
            if states:
                lanes.moved("states_written", states)
                done = lanes.write("write states", states, [done])
                self._written.append(done)
            if lane == "update":
                self._buffers.use(done)
        work = changed[False] if changed[True] == begun else self._graph.add("changed", after=list(changed.values()))
        if block.written_nbytes:
            lanes.moved("weights_written", block.written_nbytes)
            put = lanes.write("write weights", block.written_nbytes, [work])
            work = self._graph.add("put", lane, after=[put])
        if load.separate and block.home == "device" and block.id != load.small:
            self._stale.add(block.id)
        self._updated[block.id] = work
        self._written.append(work)
        self._landed[block.id] = done

    def _units(self, block: LoadedBlock) -> list[_Unit]:
        """What a block is updated by: the device's spread evenly among the CPU's."""
        there, here = block.elements_there, block.elements - block.elements_there
        count = max(1, ceil(block.elements / self._unit), 2 if there and here else 1)
        few = min(max(round(count * there / block.elements), 1 if there else 0), count - (1 if here else 0))
        taken = [(number + 1) * few // count > number * few // count for number in range(count)]
        return [_Unit(elements=there / few if each else here / (count - few), there=each) for each in taken]

    def _update_s(self, block: LoadedBlock, unit: _Unit, *, checked_nbytes: float) -> float:
        tensors = block.tensors * unit.elements / block.elements
        return update_s(
            self._load.update,
            self._cost,
            unit.elements,
            arrays=self._load.arrays,
            tensors=tensors,
            checked_nbytes=checked_nbytes,
        )

    def _update_there(self, block: LoadedBlock, unit: _Unit, after: Sequence[int], *, checked_nbytes: float) -> int:
        """A unit goes to the device with its gradient, is changed there, and comes back with new weights."""
        lanes, share = self._lanes, unit.elements / block.elements
        up = (block.states_nbytes + block.kept_nbytes) * share
        down = (block.states_nbytes + block.gradient_nbytes) * share  # new weights have the size of a pass's gradient
        piece = 4 * self._load.shard_elements
        lanes.moved("to_device", up)
        lanes.moved("from_device", down)
        task = lanes.copy(up, after, what="states", piece_nbytes=piece)
        seconds = update_there_s(self._load.update, self._cost, unit.elements, tensors=block.tensors * share)
        task = lanes.device("update there", seconds, [task])
        task = lanes.copy(down, [task], back=True, what="states", piece_nbytes=piece)
        if not checked_nbytes:
            return task
        return lanes.cores("check", "update", checks_s(self._cost, checked_nbytes), [task])
