"""Slots for the experts of a model that runs: which expert lies where, and what is read for the layer that runs now.

An expert is cut into parts that are computed one after another with all its tokens (gate and up, then down), because a
layer computes the first parts of all its experts before the second of any. Each part is a block, and has slots of its
own size. A cache and its policy say whose experts keep their slots. What they pass by goes through the slots that are
left, one after another: those are read again when they are needed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ...memory.arena import Slot
from ...memory.errors import ClosedError, StallError
from ..lease import Lease
from ..mover import Event as DeviceEvent
from .account import Account, Causes, PhaseResult
from .cache import CacheSetting, CacheStatistics, ExpertCache, Origin
from .events import Event
from .policies.policy import Policy
from .prefetch import PrefetchStatistics
from .shape import Routing
from .trace import IntArray, Phase


class Carrier(Protocol):
    """Brings blocks: an executor."""

    def bring(self, places: Sequence[tuple[int, Slot]], gone: Sequence[int] = ()) -> None:
        """See `Core.bring`."""
        ...

    def acquire(self, block: int, *, observed: bool) -> Lease:
        """A lease of a block that was brought, waiting for it."""
        ...

    def release(self, lease: Lease, event: DeviceEvent) -> None:
        """Give it back; its slot may be refilled after the event."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatistics:
    """What a pool did so far."""

    prefill: PhaseResult
    decode: PhaseResult
    cache: CacheStatistics
    capacity: int
    """Experts that the cache can hold."""
    passing: int
    """Experts that can be on their way through at a time, besides."""
    prefetching: PrefetchStatistics | None = None
    """None where nothing is brought ahead."""

    def of(self, phase: Phase) -> PhaseResult:
        """The figures of one phase."""
        return self.prefill if phase == "prefill" else self.decode


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
    ) -> None:
        assert all(len(each) > setting.capacity for each in slots), "nothing is left for what the cache passes by"
        self.routing = routing
        self.cache = ExpertCache(routing, setting, policy)
        self._policy = policy
        self._blocks = blocks
        self._capacity = min(setting.capacity, routing.total)
        self._passing = min(len(each) for each in slots) - setting.capacity
        self._free = [list(reversed(each)) for each in slots]
        self._lying: dict[int, Slot] = {}
        """By block, of those that have one."""
        self._carrier = carrier
        self._causes = Causes(routing)
        self._accounts = {"prefill": Account(), "decode": Account()}
        self._nbytes = expert_nbytes
        self._open: LayerPass | None = None
        """The layer that runs, or one that did not come to its end."""
        self._ahead: tuple[int, list[int]] = (-1, [])
        """Experts that were brought before their layer asked, and the layer."""

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

    @contextmanager
    def layer(self, event: Event) -> Iterator[LayerPass]:
        """Run one layer: what it needs is being read from now on, as far as there are slots."""
        self._recover()
        self._policy.seen(event)
        self.cache.seen(event)
        ahead = self._claim(event)
        needed = event.experts.tolist()
        held = [expert for expert in needed if self.cache.held[event.layer, expert]]
        near = {*held, *ahead}
        account = self._accounts[event.phase]
        self._causes.count(account, event, self.cache, (expert in near for expert in needed))
        ranked = sorted(zip(event.rows.tolist(), needed, strict=True), key=lambda each: -each[0])
        missed = [expert for _, expert in ranked if expert not in near]  # what has most to be done with it first
        admitted, victims = self._admit(event, sorted([*missed, *ahead]))
        account.reads += len(missed)
        self._open = run = LayerPass(self, event.layer, held, ahead, missed, admitted)
        run.advance(self._forget(victims))
        yield run
        self._open = None
        self._causes.passed(event, self.cache)

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
        blocks = self._forget([(layer, expert) for expert in gone])
        self._ahead = (-1, [])  # not before: whoever is interrupted while waiting finds them next time
        self.bring((), blocks)
        return [expert for expert in ahead if expert in needed]

    @property
    def spare(self) -> int:
        """Experts that may be brought ahead: one must be able to pass through beside them when their layer runs."""
        return self._passing - 1

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Bring experts before their layer asks: behind all that the layer that runs needs, as far as there is room.

        Called while a layer runs, at most once. Returns those that are brought.
        """
        assert self._open is not None, "no layer runs"
        assert not self._ahead[1], "what was brought ahead has not been asked for yet"
        if not self._open.all_asked_for:
            return []
        taken: list[int] = []
        places: list[tuple[int, Slot]] = []
        for expert in experts[: self.spare]:
            if self.cache.held[layer, expert] or not all(self._free):
                continue
            placed = [self.place(part, layer, expert) for part in range(self.parts)]
            places += [each for each in placed if each is not None]
            taken.append(expert)
        self._ahead = layer, taken
        self._accounts["decode"].reads += len(taken)
        self.bring(places, ())
        return taken

    def _recover(self) -> None:
        """Forget what a layer that failed has left half done."""
        run = self._open
        if run is None:
            return
        for expert in run.brought:
            sound = [self._is_there(part, self.block(part, run.layer, expert)) for part in range(self.parts)]
            kept = bool(self.cache.held[run.layer, expert])
            if kept and all(sound):
                continue
            if kept:
                self.cache.drop(run.layer, expert)
            self._carrier.bring((), self._forget([(run.layer, expert)]))
        self._open = None

    def _is_there(self, part: int, block: int) -> bool:
        """Whether a block has arrived, which is waited for; what failed on its way has been told to somebody.

        Raises:
            StallError: it is still on its way, and nothing moves: its slot is not free yet.
        """
        if block not in self._lying:
            return False
        try:
            self._carrier.release(self._acquire(part, block), None)
        except (ClosedError, StallError):
            raise
        except Exception:
            return False
        return True

    def _acquire(self, part: int, block: int) -> Lease:
        """A lease of a block that has a slot, which it loses where it could not be read: the carrier has no such block
        any more, and would give it a place of its own next time."""
        try:
            return self._carrier.acquire(block, observed=False)
        except (ClosedError, StallError):
            raise
        except Exception:
            self._free[part].append(self._lying.pop(block))
            raise

    def _forget(self, experts: Sequence[tuple[int, int]]) -> list[int]:
        """Free the slots of (layer, expert); the blocks that were in them."""
        gone = []
        for layer, expert in experts:
            for part in range(self.parts):
                gone += self.vacate(part, layer, expert)
        return gone

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

    def vacate(self, part: int, layer: int, expert: int) -> list[int]:
        """Free the slot of a part, if it has one: the block that is to be forgotten."""
        block = self.block(part, layer, expert)
        slot = self._lying.pop(block, None)
        if slot is None:
            return []
        self._free[part].append(slot)
        return [block]

    def bring(self, places: Sequence[tuple[int, Slot]], gone: Sequence[int]) -> None:
        """Have blocks brought, and others forgotten."""
        if places or gone:
            self._carrier.bring(places, gone)

    def lend(self, part: int, layer: int, expert: int) -> Lease:
        """A lease of a part that has a slot."""
        block = self.block(part, layer, expert)
        assert block in self._lying, f"expert {expert} of layer {layer} is asked for before it has a slot"
        return self._acquire(part, block)

    def give_back(self, lease: Lease, event: DeviceEvent) -> None:
        """Give a lease back."""
        self._carrier.release(lease, event)


class LayerPass:
    """One layer while it runs: part by part, all its experts in `order`.

    Args:
        pool: Whose it is.
        layer: Its number.
        there: Experts that the cache has.
        ahead: Those that were brought before the layer asked.
        missed: Those that must be read, in the order in which they are.
        admitted: Those of them that stay.
    """

    def __init__(
        self,
        pool: ExpertPool,
        layer: int,
        there: Sequence[int],
        ahead: Sequence[int],
        missed: Sequence[int],
        admitted: set[int],
    ) -> None:
        self._pool = pool
        self.layer = layer
        # Those that stay have slots at once, so that many reads are under way; the others wait for each other.
        read = sorted(missed, key=lambda expert: expert not in admitted)
        self.there = tuple(there)
        """Experts that the cache had."""
        self.brought = (*ahead, *read)
        """Experts that it had not."""
        self.order = (*there, *self.brought)
        """Experts in the order in which they are to be computed, the same in every part."""
        self._passing = set(self.brought) - admitted
        self._to_read = [deque(read) for _ in range(pool.parts)]

    @property
    def all_asked_for(self) -> bool:
        """Whether everything that the layer needs is there or on its way."""
        return not any(self._to_read)

    def advance(self, gone: Sequence[int] = ()) -> None:
        """Have as much brought as there are slots for; `gone` are blocks whose slots have been freed."""
        places = []
        for part, waiting in enumerate(self._to_read):
            while waiting:
                placed = self._pool.place(part, self.layer, waiting[0])
                if placed is None:
                    break
                places.append(placed)
                waiting.popleft()
        self._pool.bring(places, gone)

    @contextmanager
    def lent(self, part: int, expert: int, computed: Callable[[], DeviceEvent]) -> Iterator[Lease]:
        """Lease a part for as long as the context lasts, which it does not read again if it only passes through.

        Args:
            part: Of the expert.
            expert: The next of `order` in this part.
            computed: Gives the event after which its bytes may go.
        """
        lease = self._pool.lend(part, self.layer, expert)
        try:
            yield lease
        finally:
            self._pool.give_back(lease, computed())
        if expert in self._passing:
            self.advance(self._pool.vacate(part, self.layer, expert))
