"""Which blocks stay resident: a fixed subset, interleaved over the access order.

A cyclic scan defeats every recency policy: with room for a part f of the blocks, LRU misses all of them, a fixed subset
misses 1 − f. Interleaving the subset lets the disk work while resident blocks compute; a resident prefix would leave it
idle for that part of the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_SLOTS: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """One block, as far as residency is concerned."""

    id: int
    nbytes: int
    """Size of the slot it needs."""
    cost_nbytes: float
    """Bytes moved per sweep when it is not resident."""
    uses: float = 1.0
    """Times that it is used per sweep. Not to be told from the bytes: those of a tensor that is read in another dtype
    than it is computed with are twice or half its size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """A split of the blocks into resident and streamed, and the ring that the streamed ones pass through."""

    resident: frozenset[int]
    slot_nbytes: int
    slots: int
    resident_nbytes: int
    streamed_nbytes: float
    """Bytes moved per sweep."""

    @property
    def nbytes(self) -> int:
        """Bytes of arena that it takes."""
        return self.resident_nbytes + self.slots * self.slot_nbytes


def choose_residency(
    blocks: Sequence[Sized], budget: int, *, min_slots: int, depth_nbytes: int, transit_nbytes: int = 0
) -> Residency | None:
    """The split that moves the fewest bytes within `budget`, or None when no split fits.

    Every streamed block must fit a slot, so a block larger than the slots is resident. All slot sizes that occur are
    tried.

    Args:
        blocks: In access order.
        budget: Bytes of arena.
        min_slots: Slots that must exist for the model to run at all (nesting depth + 1, and one to prefetch).
        depth_nbytes: Bytes that the ring should hold to keep the link busy.
        transit_nbytes: Size of the largest block that only passes through this tier on its way to another; 0 if none
            does.
    """
    total = sum(block.nbytes for block in blocks)
    transit_slots = min_slots if transit_nbytes else 0
    if total + transit_slots * transit_nbytes <= budget:
        return Residency(
            resident=frozenset(block.id for block in blocks),
            slot_nbytes=transit_nbytes,
            slots=transit_slots,
            resident_nbytes=total,
            streamed_nbytes=0,
        )
    best: Residency | None = None
    for slot in sorted({max(block.nbytes, transit_nbytes) for block in blocks}):
        found = _with_slot(blocks, budget, slot, min_slots, depth_nbytes)
        if found is not None and (best is None or found.streamed_nbytes < best.streamed_nbytes):
            best = found
    return best


def smallest_budget(blocks: Sequence[Sized], *, min_slots: int, transit_nbytes: int = 0) -> int:
    """Bytes of arena below which no split fits."""
    total = sum(block.nbytes for block in blocks)
    sizes = sorted(max(block.nbytes, transit_nbytes) for block in blocks)
    needs = [total + (min_slots * transit_nbytes if transit_nbytes else 0)]
    total = sum(sizes)
    above = total
    for index, size in enumerate(sizes):
        above -= size
        if index + 1 == len(sizes) or sizes[index + 1] != size:
            needs.append(above + min_slots * size)  # the larger blocks stay, the others stream
    return min(needs)


def _with_slot(blocks: Sequence[Sized], budget: int, slot: int, min_slots: int, depth_nbytes: int) -> Residency | None:
    forced = [block for block in blocks if block.nbytes > slot]
    free = [block for block in blocks if block.nbytes <= slot]
    room = budget - sum(block.nbytes for block in forced)
    wanted = max(min_slots, min(MAX_SLOTS, -(-depth_nbytes // slot) + 1))
    affordable = room // slot if slot else 0
    # A small budget is split: half of it at most goes to prefetch depth, the rest keeps blocks resident.
    slots = min(wanted, max(min_slots, room // (2 * slot)))
    if affordable < min_slots or not free:
        return None
    kept = _keep(free, room - slots * slot)
    resident = frozenset(block.id for block in forced) | kept
    return Residency(
        resident=resident,
        slot_nbytes=slot,
        slots=slots,
        resident_nbytes=sum(block.nbytes for block in blocks if block.id in resident),
        streamed_nbytes=sum(block.cost_nbytes for block in blocks if block.id not in resident),
    )


def _keep(blocks: Sequence[Sized], budget: int) -> frozenset[int]:
    """Blocks that are used several times per sweep first, then a subset of those used once, then of the others."""
    often = sorted(
        (block for block in blocks if block.uses > 1),
        key=lambda block: -block.cost_nbytes / block.nbytes,
    )
    kept: set[int] = set()
    for block in often:
        if block.nbytes <= budget:
            kept.add(block.id)
            budget -= block.nbytes
    rest = [block for block in blocks if block.id not in kept]
    for turn in (False, True):
        alike = [block for block in rest if (block.uses < 1) is turn]
        chosen = interleave(alike, budget)
        budget -= sum(block.nbytes for block in alike if block.id in chosen)
        kept |= chosen
    return frozenset(kept)


def interleave(blocks: Sequence[Sized], budget: int) -> frozenset[int]:
    """Ids of blocks worth `budget` bytes, spread evenly over the order (error diffusion, as Bresenham's line)."""
    total = sum(block.nbytes for block in blocks)
    if total <= budget:
        return frozenset(block.id for block in blocks)
    if budget <= 0:
        return frozenset()
    kept: list[int] = []
    room = budget
    owed = 0.0
    for block in blocks:
        owed += block.nbytes * budget / total
        if owed >= block.nbytes / 2 and block.nbytes <= room:
            kept.append(block.id)
            room -= block.nbytes
            owed -= block.nbytes
    chosen = set(kept)
    for block in blocks:  # what rounding left over
        if block.id not in chosen and block.nbytes <= room:
            chosen.add(block.id)
            room -= block.nbytes
    return frozenset(chosen)
