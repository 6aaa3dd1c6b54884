"""Where blocks lie: slots of each tier, copies in several of them, and how room is made without copying what is clean.

A sealed block never changes, so copies of it in several tiers are all good. A copy that a slower tier has too is clean:
it is dropped. The only copy of a block is written to a slower tier once, and is clean from then on. Blocks that still
grow stay in the fastest tier.

Nothing moves here: `copy` and `make_room` say what is to be done, `finish` hears that it was. Both slots of a move are
taken until then, so that no order of completions, and no failure, can make two blocks share a slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...memory.errors import DoesNotFitError, UsageError
from .moves import Move, TierStatistics

Farness = Callable[[int], tuple[int, ...]]
"""Of a block, by id: the larger, the sooner it goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A tier, as large as it may become."""

    name: str
    budget_nbytes: int


@dataclass(kw_only=True, slots=True)
class _Copies:
    """Of one block, by number of the tier."""

    ready: dict[int, int] = field(default_factory=dict)
    """Slots."""
    arriving: set[int] = field(default_factory=set)
    pins: dict[int, int] = field(default_factory=dict)
    sealed: bool = False
    dead: bool = False
    """Nobody refers to it any more: it goes when nobody reads it any more."""


class _Slots:
    """Free slots of one tier. The lowest one goes first, so that blocks made in a row lie in a row."""

    def __init__(self, tier: Tier, slot_nbytes: int) -> None:
        self.tier = tier
        self.count = tier.budget_nbytes // slot_nbytes
        self.used = self.peak = self.arrived = self.dropped = 0
        self.blocks: set[int] = set()
        """Whose copies are there."""
        self._untouched = 0
        self._returned: list[int] = []

    @property
    def free(self) -> int:
        return self.count - self.used

    def take(self) -> int:
        assert self.free > 0, self.tier
        self.used += 1
        self.peak = max(self.peak, self.used)
        if self._returned:
            return heapq.heappop(self._returned)
        self._untouched += 1
        return self._untouched - 1

    def give(self, slot: int) -> None:
        self.used -= 1
        heapq.heappush(self._returned, slot)


class Tiers:
    """The copies of all blocks of one cache. Not thread-safe.

    Args:
        tiers: The fastest first: device, host, disk; or those of them that there are.
        slot_nbytes: Of every slot, see `KvShape.slot_nbytes`.

    Raises:
        DoesNotFitError: the fastest tier has no room for a single block.
    """

    def __init__(self, tiers: Sequence[Tier], slot_nbytes: int) -> None:
        if not tiers or slot_nbytes < 1:
            raise UsageError(f"a cache needs a tier and slots of at least a byte; not {len(tiers)} and {slot_nbytes}")
        self.slot_nbytes = slot_nbytes
        self._slots = [_Slots(tier, slot_nbytes) for tier in tiers]
        self._copies: dict[int, _Copies] = {}
        self._moves: set[Move] = set()
        if not self._slots[0].count:
            raise self.no_room(0, 1)

    def admit(self, block: int) -> int:
        """A slot of the fastest tier for a new block, which is to grow there.

        Raises:
            DoesNotFitError: there is none; `make_room` first.
        """
        assert block not in self._copies, block
        self.require(1)
        slot = self._slots[0].take()
        self._copies[block] = _Copies()
        self._arrive(block, 0, slot)
        return slot

    def require(self, slots: int) -> None:
        """See that so many slots of the fastest tier are free now.

        Raises:
            DoesNotFitError: they are not; `make_room` first.
        """
        if self._slots[0].free < slots:
            raise self.no_room(0, slots)

    def seal(self, block: int) -> None:
        """The block is whole, and never changes again."""
        self._copies[block].sealed = True

    def discard(self, block: int) -> None:
        """Nobody refers to the block any more: its slots are free once nobody reads or fills them."""
        self._copies[block].dead = True
        self._bury(block)

    def slot(self, block: int, tier: int) -> int | None:
        """Where a tier has the block; None where it does not, or not yet."""
        return self._copies[block].ready.get(tier)

    def fastest(self, block: int) -> int:
        """Number of the fastest tier that has the block."""
        return min(self._copies[block].ready)

    def arriving(self, block: int, tier: int) -> bool:
        """Whether the block is on its way to a tier."""
        return tier in self._copies[block].arriving

    def blocks(self) -> tuple[int, ...]:
        """All blocks with a copy, those among them that nobody refers to and somebody still reads."""
        return tuple(self._copies)

    def free(self, tier: int) -> int:
        """Slots that are free now."""
        return self._slots[tier].free

    def pin(self, block: int, tier: int) -> int:
        """Keep a copy where it is while it is read; returns its slot. Each call wants an `unpin`."""
        copies = self._copies[block]
        assert not copies.dead, block
        slot = copies.ready[tier]
        copies.pins[tier] = copies.pins.get(tier, 0) + 1
        return slot

    def unpin(self, block: int, tier: int) -> None:
        """It is read no more."""
        self._release(block, tier)
        self._bury(block)

    def copy(self, block: int, target: int) -> Move:
        """Bring a sealed block to a tier that does not have it, from the fastest one that has.

        Raises:
            DoesNotFitError: the tier has no free slot; `make_room` first.
        """
        copies = self._copies[block]
        assert copies.sealed, f"block {block} still grows"
        assert not copies.dead, block
        assert target not in copies.ready, (block, target)
        assert target not in copies.arriving, (block, target)
        if not self._slots[target].free:
            raise self.no_room(target, 1)
        return self._begin(block, min(copies.ready), target, leaves=False)

    def make_room(self, tier: int, slots: int, farness: Farness) -> tuple[Move, ...]:
        """Have `slots` free in a tier once all returned moves are finished; none, if they are free now.

        Those that are farthest go. What a slower tier has is dropped at once; what none has is written to the first
        slower tier with a free slot, or with one that a clean copy can give up. Copies that are on their way out
        already count as gone, unless somebody reads them: those stay.

        Raises:
            DoesNotFitError: too many are pinned or still grow, or slower tiers are full. Nothing is changed then but
                that clean copies may be gone.
        """
        leaving = sum(move.source == tier and self._gives(move) for move in self._moves)
        wanted = slots - self._slots[tier].free - leaving
        if wanted <= 0:
            return ()
        candidates = [block for block in self._slots[tier].blocks if self._may_leave(block, tier)]
        dirty = wanted - sum(self._clean(block, tier) for block in candidates)
        if len(candidates) < wanted or not self._fits_below(tier, dirty):
            raise self.no_room(tier, slots)
        moves: list[Move] = []
        for block in sorted(candidates, key=lambda one: (*farness(one), one), reverse=True):
            if wanted == 0:
                break
            if self._clean(block, tier):
                self._drop(block, tier)
            elif (target := self._place_below(tier, farness)) is not None:
                moves.append(self._begin(block, tier, target, leaves=True))
            else:
                continue  # a clean one that is nearer has to do
            wanted -= 1
        assert wanted == 0, (tier, slots)
        return tuple(moves)

    def finish(self, move: Move, *, failed: bool = False) -> None:
        """A move is over. One that failed leaves what it read where it was."""
        self._moves.remove(move)
        copies = self._copies[move.block]
        copies.arriving.remove(move.target)
        self._release(move.block, move.source)
        if failed:
            self._slots[move.target].give(move.target_slot)
        else:
            self._arrive(move.block, move.target, move.target_slot)
            self._slots[move.target].arrived += 1
            if move.leaves and move.source not in copies.pins:
                self._give(move.block, move.source)
        self._bury(move.block)

    def statistics(self) -> tuple[TierStatistics, ...]:
        """A frozen record of each tier."""
        pinned = [0] * len(self._slots)
        for copies in self._copies.values():
            for tier in copies.pins:
                pinned[tier] += 1
        unit = self.slot_nbytes
        return tuple(
            TierStatistics(
                name=slots.tier.name,
                budget_nbytes=slots.tier.budget_nbytes,
                used_nbytes=slots.used * unit,
                peak_nbytes=slots.peak * unit,
                pinned_nbytes=held * unit,
                arrived_nbytes=slots.arrived * unit,
                dropped_nbytes=slots.dropped * unit,
            )
            for slots, held in zip(self._slots, pinned, strict=True)
        )

    def _begin(self, block: int, source: int, target: int, *, leaves: bool) -> Move:
        slot = self._slots[target].take()
        self._copies[block].arriving.add(target)
        move = Move(
            block=block,
            source=source,
            source_slot=self.pin(block, source),
            target=target,
            target_slot=slot,
            nbytes=self.slot_nbytes,
            leaves=leaves,
        )
        self._moves.add(move)
        return move

    def _gives(self, move: Move) -> bool:
        """Whether a slot of its source will be free once it is finished: nothing but the move itself reads it."""
        return move.leaves and self._copies[move.block].pins[move.source] == 1

    def _may_leave(self, block: int, tier: int) -> bool:
        """A copy that is being made of it in a slower tier is waited for, rather than made twice."""
        copies = self._copies[block]
        if not copies.sealed or tier in copies.pins:
            return False
        return self._clean(block, tier) or all(other < tier for other in copies.arriving)

    def _clean(self, block: int, tier: int) -> bool:
        return any(other > tier for other in self._copies[block].ready)

    def _droppable(self, tier: int) -> list[int]:
        return [b for b in self._slots[tier].blocks if self._may_leave(b, tier) and self._clean(b, tier)]

    def _fits_below(self, tier: int, blocks: int) -> bool:
        """Whether so many have places in slower tiers: free ones, and those that clean copies can give up."""
        lower = range(tier + 1, len(self._slots))
        free = sum(self._slots[other].free for other in lower)
        return free >= blocks or free + sum(len(self._droppable(other)) for other in lower) >= blocks

    def _place_below(self, tier: int, farness: Farness) -> int | None:
        for lower in range(tier + 1, len(self._slots)):
            if self._slots[lower].free:
                return lower
            if clean := self._droppable(lower):
                self._drop(max(clean, key=lambda one: (*farness(one), one)), lower)
                return lower
        return None

    def _arrive(self, block: int, tier: int, slot: int) -> None:
        self._copies[block].ready[tier] = slot
        self._slots[tier].blocks.add(block)

    def _give(self, block: int, tier: int) -> None:
        self._slots[tier].give(self._copies[block].ready.pop(tier))
        self._slots[tier].blocks.remove(block)

    def _drop(self, block: int, tier: int) -> None:
        self._give(block, tier)
        self._slots[tier].dropped += 1

    def _release(self, block: int, tier: int) -> None:
        pins = self._copies[block].pins
        pins[tier] -= 1
        if not pins[tier]:
            del pins[tier]

    def _bury(self, block: int) -> None:
        copies = self._copies[block]
        if not copies.dead:
            return
        for tier in [tier for tier in copies.ready if tier not in copies.pins]:
            self._give(block, tier)
        if not copies.ready and not copies.arriving:
            del self._copies[block]

    def no_room(self, tier: int, slots: int) -> DoesNotFitError:
        """The error of who needs so many free slots of a tier and finds that they cannot be had."""
        here = self._slots[tier]
        needed = slots * self.slot_nbytes
        available = here.free * self.slot_nbytes
        pinned = sum(tier in copies.pins for copies in self._copies.values())
        growing = sum(not copies.sealed for copies in self._copies.values()) if tier == 0 else 0
        lower = ", ".join(f"{slots.tier.name} has {slots.free} slots free" for slots in self._slots[tier + 1 :])
        return DoesNotFitError(
            f"keys and values need {needed} bytes more of the {here.tier.name} tier, of whose "
            f"{here.tier.budget_nbytes} bytes {available} are free; of its {here.count} slots of {self.slot_nbytes} "
            f"bytes {pinned} are being used and {growing} still grow{'; ' + lower if lower else ''}. Raise the budget "
            "of the cache in that tier or a "
            "slower one, take fewer sequences at once, or cut the prompt into smaller pieces (prefill_chunk_size)",
            tier=here.tier.name,
            needed_nbytes=needed,
            available_nbytes=available,
        )
