"""A step of training before it happens: penstock's own schedule as a task graph, at a machine's rates.

Forward reads weights ahead, through a ring. Backward makes the activations of each segment again, for which its weights
come ahead too, and goes back through it: there every weight is asked for when it is needed. Gradients leave as they
come. Blocks are updated one after the other: shards are read, changed and written, a few at a time, while the next
forward waits for each block's new weights alone; or, where updates begin in backward, while that goes on.

Resources that are shared are slowed: a drive that reads and writes, the two ways of a link, cores that compute and
update. What is not in it: the first steps, in which orders are learned; the data; commits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from itertools import pairwise
from math import ceil
from typing import Final

from .cost import CostModel
from .operations import Operation
from .schedule import Slots, TaskGraph
from .sharing import is_taken
from .stepload import BlockUse, LoadedBlock, StepLoad, StepPrediction, Traffic

REQUEST: Final = 4 * 2**20
STEPS: Final = 4
"""That are simulated: the first has nothing to update, writes pile up in the next ones, the last one counts."""
PASSES: Final = 6
"""Of a step's backward passes. Where there are more, the one before the last stands for them: by then what was left of
the update has mostly been done."""
MOST_SHARDS: Final = 1500
"""Of a step. Where there are more, several are simulated as one."""
GRADIENT_SLOTS: Final = 4
"""Buffers that gradients on their way to disk pass through."""
CHECKSUM: Final = 8.5e9
"""Bytes per second that one thread checks, where memory does not give it less: xxh3, measured on 4 MiB at a time."""
_DISK: Final = frozenset(
    {"read", "read at once", "read states", "write states", "write weights", "read gradients", "write gradients"}
)
_WRITES: Final = frozenset(lane for lane in _DISK if lane.startswith("write"))


def predict(load: StepLoad, cost: CostModel) -> StepPrediction:
    """How a step goes, after some like it."""
    return _Run(load, cost).predict()


def update_s(load: StepLoad, cost: CostModel, elements: float, *, checked: bool) -> float:
    """Seconds of the CPU for the update of so many elements; `checked` with checksums of what is read and written.

    penstock's kernels are some torch operations on one sub-chunk after the other, so that is what they take.
    """
    work = load.update
    launches = work.operations * max(1, ceil(elements / work.elements))
    kernel = Operation(kind="memory", nbytes=work.nbytes * elements, launches=launches)
    seconds = cost.operation_s(kernel, "cpu")
    return seconds + checksum_s(load, cost, elements) if checked else seconds


def checksum_s(load: StepLoad, cost: CostModel, elements: float) -> float:
    """Seconds of the CPU for checksums of what is read and written of so many elements."""
    cpu = cost.processor("cpu")
    return 2 * 4 * load.arrays * elements / min(CHECKSUM, (cpu.memory_read or cpu.memory).at(1))


class _Run:
    """One simulation. Lanes are in order; a task's resource is shared with those of other lanes."""

    def __init__(self, load: StepLoad, cost: CostModel) -> None:
        self._load = load
        self._cost = cost
        self._graph = TaskGraph(
            {"cores": self._cores_left, "disk": self._disk_left, "link": self._link_left, "device": 1.0}
        )
        depth = max([load.slots, *(len(use.blocks) + 1 for use in load.uses)])
        self._ring = Slots(depth)
        self._host_ring = Slots(max(load.host_slots, 2))
        self._buffers = Slots(load.buffers)
        self._behind = Slots(load.behind)
        self._spilling = Slots(GRADIENT_SLOTS)
        self._gate: list[int] = []
        """What the processor waits for before it goes on."""
        self._computed = -1
        """The last of its tasks."""
        self._updated: dict[int, int] = {}
        """By block: the task after which its new weights are there."""
        self._stale: set[int] = set()
        """Blocks that stay on the device and have changed in host memory or on disk."""
        self._held: set[int] = set()
        """Blocks that the ring still holds when backward begins."""
        self._arrived: dict[int, int] = {}
        """By block: the task with which its gradient is there."""
        self._landed: dict[int, int] = {}
        """By block: the last write of its states. None of them is read before."""
        self._written: list[int] = []
        """What `step()` waits for: the update before it."""
        self._turns = {True: 0, False: 0}
        """Shards that were updated, of those on disk and of the others."""
        self._first_use: dict[int, int] = {}
        for index in reversed(range(len(load.uses))):
            self._first_use.update(dict.fromkeys(load.uses[index].blocks, index))
        self._times = 1
        """How often what is added happens, for the sums."""
        self._busy: dict[str, float] = defaultdict(float)
        self._bytes: dict[str, float] = defaultdict(float)
        elements = sum(block.elements for block in load.trained())
        self._unit = load.shard_elements * max(1, ceil(elements / load.shard_elements / MOST_SHARDS))

    def predict(self) -> StepPrediction:
        load = self._load
        passes = min(load.accumulate, PASSES)
        usual, times = passes - 2, load.accumulate - passes + 1
        marks: list[int] = []
        for _ in range(STEPS):
            self._busy.clear()
            self._bytes.clear()
            marks = [self._computed]
            for number in range(passes):
                self._times = times if number == usual else 1
                self._forward()
                marks.append(self._computed)
                self._backward(last=number == passes - 1, first=number == 0)
                self._computed = self._graph.add("pass", after=[self._computed, *self._gate])
                self._gate = [self._computed]
                marks.append(self._computed)
            self._times = 1
            marks.append(self._end_of_step())
        ended = self._graph.simulate().end
        at = [ended[mark] for mark in marks]
        spans = [b - a for a, b in pairwise(at)]
        if passes > 1:
            spans[2 * usual : 2 * usual + 2] = [times * span for span in spans[2 * usual : 2 * usual + 2]]
        spans[-1] += max(0.0, self._disk_s() - sum(spans))
        return StepPrediction(
            seconds=sum(spans),
            forward_s=sum(spans[:-1:2]),
            backward_s=sum(spans[1:-1:2]),
            update_s=spans[-1],
            busy_s={name: seconds for name, seconds in self._busy.items() if seconds},
            traffic=Traffic(**self._bytes),
        )

    def _disk_s(self) -> float:
        """What a step keeps drives busy for, at least: where writes pile up over more steps than are simulated, later
        ones wait for them."""
        mixed = min((drive.mixed for drive in self._cost.hardware.drives), default=1.0)
        return self._busy["disk"] / max(1.0, mixed)

    # --- forward and backward -------------------------------------------------------------------------------------

    def _forward(self) -> None:
        self._held = set()
        for use in self._load.uses:
            self._compute("forward", use, use.forward_s, ahead=True)
        self._held = set(self._streamed(self._load.uses[-(self._load.slots - 1) :]) if self._load.slots > 1 else ())

    def _backward(self, *, last: bool, first: bool) -> None:
        uses = self._load.uses
        ends = {stop: start for start, stop in self._load.segments}
        kept: frozenset[int] = frozenset()
        for index in reversed(range(len(uses))):
            if index + 1 in ends:  # made again: what its blocks leave behind in the ring is there for going back
                segment = uses[ends[index + 1] : index + 1]
                for use in segment:
                    self._compute("again", use, use.forward_s, ahead=True)
                passing = self._streamed(segment)
                kept = frozenset(passing if len(passing) < self._load.slots else passing[-1:])
            use = uses[index]
            self._compute("backward", use, use.backward_s, ahead=False, there=kept | self._held)
            for block in use.blocks:
                if self._first_use[block] == index:
                    self._gradient(self._load.blocks[block], last=last, first=first)
        small = self._load.blocks.get(self._load.small)
        if small is not None and self._load.small not in self._first_use:
            self._gradient(small, last=last, first=first)

    def _streamed(self, uses: Iterable[BlockUse]) -> list[int]:
        """Blocks of these that pass through the ring, each once."""
        found = dict.fromkeys(block for use in uses for block in use.blocks)
        return [block for block in found if self._passes(self._load.blocks[block])]

    def _passes(self, block: LoadedBlock) -> bool:
        return block.home == "disk" or (self._load.separate and block.home == "host")

    def _compute(
        self, name: str, use: BlockUse, seconds: float, *, ahead: bool, there: frozenset[int] = frozenset()
    ) -> None:
        """Lend the blocks and compute."""
        after = [*self._gate]
        taken = 0
        if ahead or use.saved:
            for number in use.blocks:
                block = self._load.blocks[number]
                if number in self._updated:
                    after.append(self._updated[number])
                if number in there or (ahead and number in self._held):
                    continue
                if self._passes(block) or number in self._stale:
                    task, took = self._bring(block, ahead=ahead)
                    after.append(task)
                    taken += took
        if ahead and name == "again":
            self._held.difference_update(use.blocks)
        self._busy["GPU" if self._load.separate else "CPU"] += self._times * seconds
        shared = "device" if self._load.separate else "cores"
        self._computed = self._graph.add(name, "compute", seconds, after=after, shared=shared, nbytes=seconds)
        self._gate = []
        for _ in range(taken):
            self._ring.use(self._computed)

    def _bring(self, block: LoadedBlock, *, ahead: bool) -> tuple[int, int]:
        """Read and copy its weights: the last task, and how many slots of the ring it took."""
        stays = block.id in self._stale
        self._stale.discard(block.id)
        at_once = [self._computed] if not ahead and self._computed >= 0 else []
        new = [self._updated[block.id]] if block.id in self._updated else []
        through = self._ring.take() if ahead and not stays else ()
        separate = self._load.separate
        task = -1
        if not block.in_memory:
            # a device apart has a ring of its own, which the copy takes a slot of
            slot = (self._host_ring.take() if ahead else ()) if separate else through
            self._bytes["weights_read"] += self._times * block.read_nbytes
            seconds = self._cost.read_s(block.read_nbytes, REQUEST)
            task = self._on_disk("read" if ahead else "read at once", seconds, [*at_once, *new, *slot])
        if separate:
            self._bytes["to_device"] += self._times * block.weights_nbytes
            seconds = self._cost.copy_s(block.weights_nbytes, REQUEST)
            after = [*at_once, *new, *through, *([task] if task >= 0 else [])]
            read = task >= 0
            task = self._on_link("h2d" if ahead else "h2d at once", seconds, after)
            if read and ahead:
                self._host_ring.use(task)
        return task, int(ahead and not stays)

    # --- gradients and updates ------------------------------------------------------------------------------------

    def _gradient(self, block: LoadedBlock, *, last: bool, first: bool) -> None:
        """A block's gradients leave: the processor waits until they are where they are kept."""
        if not block.elements:
            return
        after = self._computed
        if self._load.separate:
            self._bytes["from_device"] += self._times * block.gradient_nbytes
            after = self._on_link("d2h", self._cost.copy_s(block.gradient_nbytes, REQUEST, back=True), [after])
        moved = block.gradient_nbytes + (1 if first else 2) * block.kept_nbytes
        wait: list[int] = []
        if block.spilled and not first:
            self._bytes["gradients_read"] += self._times * block.kept_nbytes
            seconds = self._cost.read_s(block.kept_nbytes, REQUEST)
            wait.append(self._on_disk("read gradients", seconds, [self._arrived[block.id]]))
        early = last and self._load.updates == "backward"  # the last of a sum goes into the update, not to disk
        if block.spilled and not early:
            wait += self._spilling.take()
        put = self._on_cores("put", "gradients", self._memory_s(moved), [after, *wait])
        self._arrived[block.id] = put
        if block.spilled and not early:
            self._bytes["gradients_written"] += self._times * block.kept_nbytes
            written = self._on_disk("write gradients", self._cost.write_s(block.kept_nbytes, REQUEST), [put])
            self._spilling.use(written)
            self._arrived[block.id] = written
        self._gate.append(put)
        if early and block.id != self._load.small:
            submitted = self._graph.add("submit", after=[put, *self._behind.take()])
            self._gate.append(submitted)
            self._update(block, submitted)
            self._behind.use(self._updated[block.id])

    def _end_of_step(self) -> int:
        """`step()`: the last task before it returns."""
        load = self._load
        early = load.updates == "backward"
        after = [self._computed, *self._gate]
        if not early:  # the norm is that of all gradients, in fp32, and what was changed before is there
            norm = sum(block.kept_nbytes + 8 * block.elements for block in load.trained())
            after += [
                self._arrived[block.id] for block in load.trained() if block.spilled and block.id in self._arrived
            ]
            after = [self._on_cores("norm", "gradients", self._memory_s(norm), [*after, *self._written])]
            self._written = []
        begun = self._graph.add("step", after=after)
        small = load.blocks.get(load.small)
        gate = [begun]
        if small is not None and small.elements:
            self._update(small, begun, lane="update at once")
            gate.append(self._updated[small.id])
        if not early:
            for block in sorted(load.trained(), key=lambda each: each.id):
                if block.id != load.small and block.id in self._first_use:
                    self._update(block, begun)
        returned = self._graph.add("returned", after=gate)
        self._gate = [returned]
        self._computed = returned
        return returned

    def _update(self, block: LoadedBlock, begun: int, *, lane: str = "update") -> None:
        """Its shards are read, changed and written, then its weights."""
        load, graph = self._load, self._graph
        units = max(1, ceil(block.elements / self._unit))
        elements, states = block.elements / units, block.states_nbytes / units
        spilled = block.kept_nbytes / units if block.spilled and load.updates == "step" else 0.0
        on_disk = not block.states_in_memory
        share = load.device_on_disk if on_disk else load.device_in_memory
        there_too = begun
        work = done = begun
        for _ in range(units):
            slot = self._buffers.take() if lane == "update" else ()
            there = [begun, *slot]
            read = spilled + (states if on_disk else 0.0)
            if read:
                self._bytes["states_read"] += states if on_disk else 0.0
                self._bytes["gradients_read"] += spilled
                after = [*there, *([self._arrived[block.id]] if spilled else [])]
                after += [self._landed[block.id]] if block.id in self._landed else []
                there.append(self._on_disk("read states", self._cost.read_s(read, REQUEST), after))
            if lane == "update" and self._is_devices(on_disk, share):
                there_too = done = self._update_there(block, units, there, checked=on_disk)
            else:
                work = self._on_cores(lane, lane, update_s(load, self._cost, elements, checked=on_disk), there)
                done = work
            if on_disk:
                self._bytes["states_written"] += states
                done = self._on_disk("write states", self._cost.write_s(states, REQUEST), [done])
                self._written.append(done)
            if lane == "update":
                self._buffers.use(done)
        if there_too != begun:
            work = graph.add("changed", after=[work, there_too])
        if not block.in_memory and block.id != load.small:
            self._bytes["weights_written"] += block.weights_nbytes
            put = self._on_disk("write weights", self._cost.write_s(block.weights_nbytes, REQUEST), [work])
            work = graph.add("put", lane, after=[put])
        if load.separate and block.home == "device" and block.id != load.small:
            self._stale.add(block.id)
        self._updated[block.id] = work
        self._written.append(work)
        self._landed[block.id] = done

    def _is_devices(self, on_disk: bool, share: float) -> bool:
        """Whether the device updates the next of these."""
        turn = self._turns[on_disk]
        self._turns[on_disk] += 1
        return is_taken(turn, share)

    def _update_there(self, block: LoadedBlock, units: int, after: Iterable[int], *, checked: bool) -> int:
        """One unit goes to the device, is changed, and comes back."""
        up = (block.states_nbytes + block.kept_nbytes) / units
        down = (block.states_nbytes + block.weights_nbytes) / units
        self._bytes["to_device"] += up
        self._bytes["from_device"] += down
        elements = block.elements / units
        task = self._on_link("h2d states", self._cost.copy_s(up, REQUEST), after)
        work = Operation(
            kind="memory", nbytes=self._load.update.nbytes * elements, launches=self._load.update.operations
        )
        seconds = self._cost.operation_s(work, "gpu")
        self._busy["GPU"] += seconds
        task = self._graph.add("update there", "update there", seconds, after=[task], shared="device", nbytes=seconds)
        task = self._on_link("d2h states", self._cost.copy_s(down, REQUEST, back=True), [task])
        if not checked:
            return task
        return self._on_cores("check", "update", checksum_s(self._load, self._cost, elements), [task])

    # --- resources ------------------------------------------------------------------------------------------------

    def _memory_s(self, nbytes: float) -> float:
        return self._cost.operation_s(Operation(kind="memory", nbytes=nbytes), "cpu") if nbytes else 0.0

    def _on_disk(self, lane: str, seconds: float, after: Iterable[int]) -> int:
        self._busy["disk"] += self._times * seconds
        return self._graph.add(lane, lane, seconds, after=after, shared="disk", nbytes=seconds)

    def _on_link(self, lane: str, seconds: float, after: Iterable[int]) -> int:
        back = lane.startswith("d2h")
        self._busy["device-to-host link" if back else "host-to-device link"] += self._times * seconds
        return self._graph.add(lane, lane, seconds, after=after, shared="link", nbytes=seconds)

    def _on_cores(self, name: str, lane: str, seconds: float, after: Iterable[int]) -> int:
        self._busy["CPU"] += self._times * seconds
        return self._graph.add(name, lane, seconds, after=after, shared="cores", nbytes=seconds)

    def _cores_left(self, lanes: Set[str]) -> float:
        """Of all cores' time, what is left beside the drives."""
        return self._cost.hardware.sharing.compute_while_reading if lanes & _DISK else 1.0

    def _disk_left(self, lanes: Set[str]) -> float:
        sharing, busy = self._cost.hardware.sharing, lanes & _DISK
        computing = bool(lanes & {"update", "update at once", "gradients"}) or (
            "compute" in lanes and not self._load.separate
        )
        both = bool(busy & _WRITES) and bool(busy - _WRITES)
        mixed = min((drive.mixed for drive in self._cost.hardware.drives), default=1.0) if both else 1.0
        return mixed * (sharing.read_while_computing if computing else 1.0)

    def _link_left(self, lanes: Set[str]) -> float:
        link = self._cost.hardware.link
        both = bool(lanes & {"d2h", "d2h states"}) and bool(lanes & {"h2d", "h2d at once", "h2d states"})
        return 2 * link.duplex if both and link is not None else 1.0
