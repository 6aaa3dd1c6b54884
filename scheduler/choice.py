"""Which blocks get a place next: those that are waited for, then those that will be. Decisions: no time, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ..memory.errors import DoesNotFitError
from .lease import Wish
from .order import AccessOrders
from .prefetch import first_unloaded, next_fetch, victim_for_demand
from .residence import Residence, Tier
from .wishes import Wishes

HORIZON: Final = 1024
"""Predicted accesses that a decision looks at."""


class Choice:
    """Gives blocks their places. Used under the executor's lock.

    Args:
        front: The tier that consumers lease from.
        back: The host tier that blocks pass through on their way to `front`; None when they are one tier.
        nbytes: Size of each block, for the in-flight limit.
        inflight_nbytes: Prefetches under way are kept below this, so that a demand does not queue behind them.
        on_cpu: Blocks that stay in `back` and are brought although no order of the device's may ever name them.
        ordered: How many of the blocks orders can name.
        away: Blocks that nobody may have, because their bytes change.
        wishes: Of consumers that wait.
    """

    def __init__(
        self,
        *,
        front: Tier,
        back: Tier | None,
        orders: AccessOrders,
        nbytes: Mapping[int, int],
        inflight_nbytes: int,
        on_cpu: Iterable[int],
        ordered: int,
        away: Mapping[int, object],
        wishes: Wishes,
    ) -> None:
        self._front, self._back = front, back
        self._orders = orders
        self._nbytes = nbytes
        self._inflight_limit = inflight_nbytes
        self._horizon_blocks = min(ordered + 1, HORIZON)
        self._unasked = deque(on_cpu)
        """Those of `on_cpu` that nobody has asked for yet."""
        self._away = away
        self._wishes = wishes

    def for_front(self) -> list[Residence]:
        """Places in the tier that consumers lease from."""
        return self._serve_wishes() + self._prefetch(self._front)

    def _serve_wishes(self) -> list[Residence]:
        """Places for blocks that consumers wait for and that are neither held nor on their way."""
        placed = []
        for wish in [wish for wish in self._wishes.waiting if not wish.host and wish.block not in self._away]:
            held = self._front.holding.get(wish.block)
            if held is not None:
                if held.ready:  # it arrived between the consumer's look and now
                    self._wishes.grant(wish, held)
                elif held.error is not None:  # a guest that failed while nobody waited for it
                    self._wishes.refuse(wish, held.error)
                    self._front.drop(held.block)
                continue
            victim = None
            if wish.block not in self._front.permanent and not self._front.free:
                victim = victim_for_demand(self._orders.upcoming(self._horizon()), evictable=self._front.evictable())
                if victim is None:
                    self._refuse_if_hopeless(wish)
                    continue
            placed.append(self._front.place(wish.block, urgent=True, victim=victim))
        return placed

    def _refuse_if_hopeless(self, wish: Wish) -> None:
        """Every slot leased at once: no completion will ever free one for this wish."""
        held = [self._front.holding[block] for block in self._front.in_ring()]
        if not held or not all(h.leases and h.ready for h in held):
            return
        slot = held[0].slot.nbytes
        self._wishes.refuse(
            wish,
            DoesNotFitError(
                f"block {wish.block} is needed while all {len(held)} {self._front.name} slots of {slot} bytes are in "
                f"use at once: raise the {self._front.name} budget by at least {slot} bytes, or gather fewer modules "
                f"at a time",
                tier=self._front.name,
                needed_nbytes=slot * (len(held) + 1),
                available_nbytes=slot * len(held),
            ),
        )

    def _prefetch(self, tier: Tier) -> list[Residence]:
        """Places for the next blocks of the predicted order, as far as slots and the in-flight limit allow."""
        placed: list[Residence] = []
        flying = sum(self._nbytes[block] for block in tier.arriving)
        while flying < self._inflight_limit:
            block = self._next(tier)
            if block is None:
                break
            placed.append(block)
            flying += self._nbytes[block.block]
        return placed

    def _next(self, tier: Tier) -> Residence | None:
        ring = (block for block in self._upcoming() if block not in tier.permanent)
        fetch = next_fetch(ring, present=tier.in_ring(), evictable=tier.evictable(), free_slots=len(tier.free))
        loading = first_unloaded(self._upcoming(), tier.unloaded) if tier.unloaded else None
        if loading is not None and (fetch is None or self._is_sooner(loading, fetch.block)):
            return tier.place(loading, urgent=False)
        if fetch is None:
            return None
        return tier.place(fetch.block, urgent=False, victim=fetch.victim)

    def _upcoming(self) -> Iterator[int]:
        """The next accesses as predicted, without blocks that cannot be brought."""
        without = self._wishes.failed.keys() | self._away.keys()
        return (block for block in self._orders.upcoming(self._horizon()) if block not in without)

    def _is_sooner(self, block: int, other: int) -> bool:
        """Whether one of two blocks to come is used before the other."""
        return next(each for each in self._upcoming() if each in (block, other)) == block

    def _horizon(self) -> int:
        return self._horizon_blocks

    def _serve_host_wishes(self, back: Tier) -> list[Residence]:
        """Places for blocks that are waited for where they stay."""
        placed = []
        for wish in [wish for wish in self._wishes.waiting if wish.host and wish.block not in self._away]:
            held = back.holding.get(wish.block)
            if held is None:
                placed.append(back.place(wish.block, urgent=True))
            elif held.ready:
                self._wishes.grant(wish, held)
            elif held.error is not None:  # a guest that failed while nobody waited for it
                self._wishes.refuse(wish, held.error)
                back.drop(held.block)
        return placed

    def for_back(self) -> list[Residence]:
        """Host places: for those who wait there, for blocks that the device is about to take, then ahead of it."""
        back = self._back
        assert back is not None
        placed = self._serve_host_wishes(back)
        wanted = [held for held in self._front.arriving.values() if held.block not in back.holding]
        wanted.sort(key=lambda held: not held.urgent)
        needed = self._front.arriving.keys()
        for held in wanted:
            victim = None
            if held.block not in back.permanent and not back.free:
                victim = victim_for_demand(self._orders.upcoming(self._horizon()), evictable=back.evictable() - needed)
                if victim is None:
                    return placed
            placed.append(back.place(held.block, urgent=held.urgent, victim=victim))
        flying = sum(self._nbytes[block] for block in back.arriving)
        for block in self._upcoming():
            if flying >= self._inflight_limit:
                break
            if block in self._front.holding or block in back.holding:
                continue
            if block in back.permanent or back.free:
                placed.append(back.place(block, urgent=False))
                flying += self._nbytes[block]
        while self._unasked and self._unasked[0] not in self._away and flying < self._inflight_limit:
            block = self._unasked.popleft()
            if block in back.unloaded:
                placed.append(back.place(block, urgent=False))
                flying += self._nbytes[block]
        return placed
