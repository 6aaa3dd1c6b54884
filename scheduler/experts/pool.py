"""Slots for the experts of a model that runs: which expert lies where, and what is read for the layer that runs now.

An expert is cut into parts that are computed one after another with all its tokens (gate and up, then down), because a
layer computes the first parts of all its experts before the second of any. Each part is a block, and has slots of its
own size. A cache and its policy say whose experts keep their slots. What they pass by goes through the slots that are
left, one after another: those are read again when they are needed again.

A layer may end anywhere: by an error, or by an interrupt between any two lines. What lies where is therefore told by
one record alone; what has left it is told to the carrier until the carrier has heard it; and the next layer makes the
rest agree.

Slots lie where experts are computed. Beside a device apart that is its memory, and host memory keeps experts too: all
of them, or those on a shelf (`shelf.py`). What lies there can be computed by the CPU, where that is done sooner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ...memory.arena import Slot
from ...memory.errors import ClosedError, StallError
from ..lease import Lease
from ..mover import Event as DeviceEvent
from .account import Account, Causes, PoolStatistics
from .cache import CacheSetting, ExpertCache, Origin
from .carrier import Carrier
from .events import Event
from .layerpass import LayerPass
from .layerscheduler import LayerScheduler
from .policies.policy import Policy
from .shape import Routing
from .shelf import HostShelf
from .timelines import ExpertTask
from .trace import IntArray


class ExpertPool:
    """The experts of all layers. One layer of one step at a time; whoever runs layers sees to that.

    Args:
        routing: The model's.
        setting: How the cache is run.
        policy: That has seen nothing yet.
        blocks: By part, [layers, experts]: its block.
        slots: By part, its slots: as many as the cache has, and at least one more.
        carrier: Brings them.
        expert_nbytes: Read from disk for an expert, for the figures.
        apart: Whether slots lie on a device apart.
        shelf: Of the host, then; None where host memory keeps all experts.
    """

    def __init__(
        self,
        *,
        routing: Routing,
        setting: CacheSetting,
        policy: Policy,
        blocks: Sequence[IntArray],
        slots: Sequence[Sequence[Slot]],
        carrier: Carrier,
        expert_nbytes: int = 0,
        apart: bool = False,
        shelf: HostShelf | None = None,
    ) -> None:
        assert apart or shelf is None, "there is one tier"
        assert all(len(each) > setting.capacity for each in slots), "nothing is left for what the cache passes by"
        self.routing = routing
        self.cache = ExpertCache(routing, setting, policy)
        self._policy = policy
        self._blocks = blocks
        self._capacity = min(setting.capacity, routing.total)
        self._passing = min(len(each) for each in slots) - setting.capacity
        self._slots = [tuple(reversed(each)) for each in slots]
        self._free = [list(each) for each in self._slots]
        self._lying: dict[int, Slot] = {}
        """By block, of those that have one."""
        self._untold: dict[int, None] = {}
        """Blocks that have lost theirs, and the carrier may not have heard of it yet."""
        self._carrier = carrier
        self._causes = Causes(routing)
        self._accounts = {"prefill": Account(), "decode": Account()}
        self._nbytes = expert_nbytes
        self._begun: Event | None = None
        """The layer that runs, or one that did not come to its end."""
        self._open: LayerPass | None = None
        """The same, once it is known what moves."""
        self._ahead: tuple[int, list[int]] = (-1, [])
        """Experts that were brought before their layer asked, and the layer."""
        self._pending: deque[int] = deque()
        """Those of the same layer that are to be, as soon as there is room."""
        self._filling: set[tuple[int, int]] = set()
        """(layer, expert) of what was brought for no layer that waited for it."""
        self._apart = apart
        self._shelf = shelf
        self._scheduler: LayerScheduler | None = None

    @property
    def parts(self) -> int:
        """Of an expert."""
        return len(self._blocks)

    def statistics(self) -> PoolStatistics:
        """What came of it so far. Bytes are those of whole experts, as they are asked for."""
        return PoolStatistics(
            prefill=self._accounts["prefill"].result(self._nbytes),
            decode=self._accounts["decode"].result(self._nbytes),
            cache=self.cache.statistics(),
            capacity=self._capacity,
            passing=self._passing,
        )

    def share_with_cpu(self, scheduler: LayerScheduler) -> None:
        """Let the CPU compute experts from host memory where a layer is done sooner by that."""
        assert self._apart, "there is one processor"
        self._scheduler = scheduler

    @contextmanager
    def layer(self, event: Event, *, shared: bool = True) -> Iterator[LayerPass]:
        """Run one layer: what it needs is being read from now on, as far as there are slots.

        Args:
            event: The layer.
            shared: Whether the CPU can compute some of it beside a device apart.
        """
        self._recover()
        self._begun = event
        self._policy.seen(event)
        self.cache.seen(event)
        if self._shelf is not None:
            self._shelf.cache.seen(event)
        ahead = self._claim(event)
        needed = event.experts.tolist()
        near = {*ahead, *(expert for expert in needed if self.cache.held[event.layer, expert])}
        account = self._accounts[event.phase]
        self._causes.count(account, event, self.cache, (expert in near for expert in needed))
        tasks = self.tasks(event.layer, needed, event.rows.tolist(), near)
        by_cpu, kept = self._divided(event, tasks, ahead, shared=shared)
        moved = [task for task in tasks if task.expert not in near and task.expert not in by_cpu]
        missed = [task.expert for task in sorted(moved, key=lambda task: -task.rows)]  # what takes longest first
        admitted, victims = self._admit(event, sorted([*missed, *ahead]))
        held = [expert for expert in needed if expert in near and expert not in by_cpu and expert not in ahead]
        account.reads += sum(not task.on_host and (task in moved or task.expert in by_cpu) for task in tasks)
        account.copies += len(missed) if self._apart else 0
        account.computed_by_cpu += len(by_cpu)
        self._open = run = LayerPass(self, event.layer, held, ahead, missed, admitted, by_cpu, kept, tasks)
        self._forget(victims)
        run.advance()
        yield run
        self._pending.clear()
        self._open = self._begun = None
        self._causes.passed(event, self.cache)

    def tasks(self, layer: int, experts: Sequence[int], rows: Sequence[int], near: Collection[int]) -> list[ExpertTask]:
        """Experts of a layer, and where they are: `near` are those in the tier that computes."""
        return [
            ExpertTask(
                expert=expert,
                rows=count,
                on_device=self._apart and expert in near,
                on_host=self._on_host(layer, expert, near),
            )
            for expert, count in zip(experts, rows, strict=True)
        ]

    def _on_host(self, layer: int, expert: int, near: Collection[int]) -> bool:
        """Whether it need not be read from disk."""
        if not self._apart:
            return expert in near
        return self._shelf is None or bool(self._shelf.held[layer, expert])

    def _divided(
        self, event: Event, tasks: Sequence[ExpertTask], ahead: Sequence[int], *, shared: bool
    ) -> tuple[list[int], list[int]]:
        """Experts that the CPU computes, and those that are being read to stay in host memory. What was brought
        `ahead` has slots that it is to leave: the device computes it."""
        by_cpu: Collection[int] = ()
        if self._scheduler is not None and shared:
            by_cpu = frozenset(self._scheduler.plan(tasks).computed_by_cpu).difference(ahead)
        kept: list[int] = []
        there = {task.expert for task in tasks if task.on_host}
        if self._shelf is not None:
            read = [task.expert for task in tasks if not task.on_host and (task.expert in by_cpu or not task.on_device)]
            places = self._shelf.take(event, read)
            taken = set(self._carrier.bring((), (), kept=places)) if places else set()
            # What passes through the host just now, for a layer that ended, is in the way of itself.
            self._shelf.refused(event.layer, {self._expert_of(block) for block, _ in places if block not in taken})
            kept = [expert for expert in read if self._shelf.held[event.layer, expert]]
            there |= set(kept)
        # What the shelf does not take in passes through the host on its way to the device only.
        return [task.expert for task in tasks if task.expert in by_cpu and task.expert in there], kept

    def _admit(self, event: Event, missed: Sequence[int]) -> tuple[set[int], list[tuple[int, int]]]:
        """Which of them the cache keeps, and (layer, expert) of those that go for them. A prompt evicts nothing."""
        if event.phase == "prefill":
            return set(self.cache.fill_free(event.layer, missed, origin=Origin.WARMED)), []
        taken = self.cache.admit(event.layer, missed, needed=event.experts)
        return {expert for expert, _ in taken}, [victim for _, victim in taken if victim is not None]

    def _claim(self, event: Event) -> list[int]:
        """Those of the experts brought ahead that the event needs; the others are forgotten."""
        layer, ahead = self._ahead
        needed = set(event.experts.tolist()) if layer == event.layer else set()
        gone = [expert for expert in ahead if expert not in needed]
        for expert in gone:
            for part in range(self.parts):
                self._is_there(part, self.block(part, layer, expert))  # what is still on its way cannot be forgotten
        self._ahead = (-1, [])
        self._forget([(layer, expert) for expert in gone])
        self.bring(())
        return [expert for expert in ahead if expert in needed]

    @property
    def spare(self) -> int:
        """Experts that may be brought ahead: one must be able to pass through beside them when their layer runs."""
        return self._passing - 1

    def prefetch(self, layer: int, experts: Sequence[int], *, later: bool = False) -> list[int]:
        """Bring experts before their layer asks: behind all that the layer that runs needs, as far as there is room.

        Called while a layer runs, at most once. Returns those that are brought; with `later`, others are when the layer
        that runs has used what passes through (`brought_ahead`).
        """
        assert self._open is not None, "no layer runs"
        assert not self._ahead[1], "what was brought ahead has not been asked for yet"
        self._ahead = layer, []
        self._pending.extend(experts[: self.spare])
        self.go_on_ahead()
        if not later:
            self._pending.clear()
        return self.brought_ahead

    @property
    def brought_ahead(self) -> list[int]:
        """The experts that have been brought for a layer that has not asked yet."""
        return list(self._ahead[1])

    def go_on_ahead(self) -> None:
        """Bring what is still to be brought ahead, as far as there is room now."""
        assert self._open is not None, "no layer runs"
        if not self._pending or not self._open.all_asked_for:
            return
        layer, taken = self._ahead
        places: list[tuple[int, Slot]] = []
        brought = 0
        while self._pending and all(self._free):
            expert = self._pending.popleft()
            if self.cache.held[layer, expert] or (self._apart and not self._on_host(layer, expert, ())):
                continue  # beside a device, what would have to be read first is not brought
            placed = [self.place(part, layer, expert) for part in range(self.parts)]
            places += [each for each in placed if each is not None]
            taken.append(expert)
            brought += 1
        self._accounts["decode"].copies += brought if self._apart else 0
        self._accounts["decode"].reads += 0 if self._apart else brought
        if places:
            self.bring(places, urgent=False)

    def fill(self, event: Event, expert: int) -> bool:
        """Beside a device apart: bring what the CPU computes for the layer that runs, behind all that it needs, if the
        cache would have it. Returns whether it is brought."""
        assert self._open is not None, "no layer runs"
        assert self._apart, "there is one processor"
        if not self._open.all_asked_for or self.cache.held[event.layer, expert] or not all(self._free):
            return False
        taken = self.cache.admit(event.layer, [expert], needed=event.experts, origin=Origin.FILLED)
        if not taken:
            return False
        self._filling.add((event.layer, expert))
        self._forget([victim for _, victim in taken if victim is not None])
        placed = [self.place(part, event.layer, expert) for part in range(self.parts)]
        self.bring([each for each in placed if each is not None], urgent=False)
        self._accounts[event.phase].copies += 1
        return True

    def _recover(self) -> None:
        """Make slots, caches and carrier agree where a layer did not come to its end, wherever it was left."""
        event, run = self._begun, self._open
        if event is None:
            return
        self.bring(())
        for layer, expert in np.argwhere(self.cache.held).tolist():
            blocks = [self.block(part, layer, expert) for part in range(self.parts)]
            sound = all(block in self._lying for block in blocks)
            if layer == event.layer:  # all else has arrived, or was brought in vain and tells who asks for it
                arrived = [self._is_there(part, block) for part, block in enumerate(blocks)]
                sound = all(arrived)
            if not sound:
                self.cache.drop(layer, expert)
        self.cache.recount()
        for part, numbers in enumerate(self._blocks):
            for layer, expert in np.argwhere(~self.cache.held).tolist():
                if int(numbers[layer, expert]) in self._lying:
                    self._is_there(part, int(numbers[layer, expert]))  # what is still on its way cannot be forgotten
                    self.vacate(part, layer, expert)
        self._ahead = (-1, [])
        self._pending.clear()
        self.bring(())
        for part, slots in enumerate(self._slots):
            taken = {slot.offset for slot in self._lying.values()}
            self._free[part] = [slot for slot in slots if slot.offset not in taken]
        if self._shelf is not None:
            doubtful = event.experts.tolist() if run is None else run.kept
            self._shelf.refused(event.layer, doubtful)
            self._shelf.recover()
        self._open = self._begun = None

    def _is_there(self, part: int, block: int) -> bool:
        """Whether a block has arrived, which is waited for; what failed on its way has been told to somebody.

        Raises:
            StallError: it is still on its way, and nothing moves: its slot is not free yet.
        """
        if block not in self._lying:
            return False
        try:
            self._carrier.release(self._acquire(part, block, counted=False), None)
        except (ClosedError, StallError):
            raise
        except Exception:
            return False
        return True

    def _acquire(self, part: int, block: int, *, counted: bool = True) -> Lease:
        """A lease of a block that has a slot, which it loses where it could not be read: the carrier has no such block
        any more, and would give it a place of its own next time."""
        try:
            return self._carrier.acquire(block, observed=False, counted=counted)
        except (ClosedError, StallError):
            raise
        except Exception:
            self._free[part].append(self._lying.pop(block))
            raise

    def _forget(self, experts: Sequence[tuple[int, int]]) -> None:
        """Free the slots of (layer, expert)."""
        for layer, expert in experts:
            for part in range(self.parts):
                if (layer, expert) in self._filling:  # it may still be on its way, and cannot be forgotten then
                    self._is_there(part, self.block(part, layer, expert))
                self.vacate(part, layer, expert)
            self._filling.discard((layer, expert))

    # --- of the layer that runs -------------------------------------------------------------------------------------

    def block(self, part: int, layer: int, expert: int) -> int:
        """Its number."""
        return int(self._blocks[part][layer, expert])

    def place(self, part: int, layer: int, expert: int) -> tuple[int, Slot] | None:
        """Give a part a slot, if one is free."""
        if not self._free[part]:
            return None
        block = self.block(part, layer, expert)
        assert block not in self._lying, f"block {block} has a slot already"
        slot = self._lying[block] = self._free[part].pop()
        return block, slot

    def vacate(self, part: int, layer: int, expert: int) -> None:
        """Free the slot of a part, if it has one. The carrier hears of it with what is brought next."""
        block = self.block(part, layer, expert)
        slot = self._lying.get(block)
        if slot is not None:
            self._untold[block] = None  # first: who is interrupted behind it says once too often what is true
            del self._lying[block]
            self._free[part].append(slot)

    def bring(self, places: Sequence[tuple[int, Slot]], *, urgent: bool = True) -> None:
        """Have blocks brought, and those forgotten that have no slot any more."""
        gone = tuple(self._untold)
        if places or gone:
            self._carrier.bring(places, gone, urgent=urgent)
            for block in gone:
                del self._untold[block]

    def _expert_of(self, block: int) -> int:
        """Which expert of its layer a block is of."""
        first = int(self._blocks[0][0, 0])
        return (block - first) % self.routing.experts

    def lend_host(self, part: int, layer: int, expert: int) -> Lease:
        """A lease of what host memory keeps, beside a device apart."""
        return self._carrier.acquire_host(self.block(part, layer, expert))

    def lend(self, part: int, layer: int, expert: int) -> Lease:
        """A lease of a part that has a slot."""
        block = self.block(part, layer, expert)
        assert block in self._lying, f"expert {expert} of layer {layer} is asked for before it has a slot"
        return self._acquire(part, block)

    def give_back(self, lease: Lease, event: DeviceEvent) -> None:
        """Give a lease back."""
        self._carrier.release(lease, event)
