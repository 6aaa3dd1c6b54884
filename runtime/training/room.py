"""Host memory of training: what it takes beside weights, and what of gradients and states stays there in the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from ...kernels.scratch import SUBCHUNK
from ...memory.arena import round_up
from ...memory.image import ALIGN
from ...scheduler.plan import Plan
from ...scheduler.sharing import is_taken, share_out
from ...scheduler.updating import UpdateShares
from ..build import Machinery
from ..explain import gib
from ..layout import Changing, Layout
from .deviceupdates import DeviceUpdates
from .gradientroom import GradientPool
from .pipeline import BUFFERS, ShardPipeline
from .run import Settings
from .shards import ELEMENTS, GRAIN, Piece, Shard
from .spill import RING, WIDE
from .trained import Trained, gradient_dtype
from .training import BEHIND
from .updater import SMALL
from .weights import TrainedWeights

MOST_BLOCK: Final = 64 << 20
POOL: Final = BEHIND + 2
"""Blocks whose gradients have places, where those of a device apart are used as they come: those that wait, and two
that are not whole yet."""
ARRAYS: Final = 3
"""Of a shard, at most: masters and two states."""


def changing(
    weights: Collection[int],
    *,
    accumulate: int,
    early: bool,
    arrays: int = 0,
    limit: int | None = None,
    separate: bool = False,
    on_device: bool = False,
) -> Changing:
    """Host memory that training takes beside weights of so many bytes each.

    Gradients can go to disk, but for those of the small tensors and the one that was just made, or there are only those
    of blocks that wait for their update, where updates begin early. The buffers that shards pass through, and gradients
    beside them; what norms and updates compute with; one buffer that a block of weights is put together in.

    Args:
        weights: Bytes of each.
        accumulate: Backward passes of a step.
        early: Whether updates begin in backward.
        arrays: Of a shard: masters and states, which may stay in memory where there is room; 0 to leave them on disk.
        limit: What the blocks of a run that goes on were cut by.
        separate: Whether gradients are made on a device apart, and pass through pinned memory.
        on_device: Whether that updates some shards.
    """
    total, largest = sum(weights), max(weights, default=0)
    block = max(largest, min(MOST_BLOCK, total // 16) if limit is None else min(limit, total))
    shard = min(ELEMENTS, round_up(total // 2, GRAIN))
    small = total // 32  # these are updated last
    every = 2 * total if accumulate > 1 else total
    least = min(every, (2 if accumulate > 1 else 1) * small + (RING + BUFFERS) * WIDE * shard)
    if early:
        least = every if accumulate > 1 else min(total, (POOL if separate else BEHIND + 1) * block + small)
        every = every if separate else least
    own = least + BUFFERS * ARRAYS * 4 * shard + (5 if separate else 3) * largest + 2 * 12 * SUBCHUNK + block
    more = every - least + 4 * arrays * (total // 2 + GRAIN * len(weights))  # each begins at a multiple of GRAIN
    lanes = DeviceUpdates.needed_nbytes(shard, ARRAYS) if on_device else 0
    return Changing(own_nbytes=own, more_nbytes=more, block_nbytes=block, limit_nbytes=limit, own_device_nbytes=lanes)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRoom:
    """The decision. Parameters by their number among those that are trained."""

    spilled: frozenset[int]
    """Parameters whose gradients go to disk."""
    itemsizes: tuple[int, ...]
    """Bytes of an element of each parameter's gradient, at most."""
    resident: frozenset[int]
    """Shards that stay."""
    behind: int = BEHIND
    """Blocks whose gradients may wait for their update, where backward begins them."""
    pooled: bool = False
    """Whether only so many have places for their gradients."""
    on_device: frozenset[int] = frozenset()
    """Shards that a device apart updates."""
    unused_nbytes: int
    """Of the room, what is of no use to training."""
    notes: tuple[str, ...]
    """For the plan."""


def plan_room(
    machinery: Machinery, trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int
) -> TrainingRoom:
    """Share out what the layout has set aside for training.

    Args:
        machinery: Of the model; its layout says how much there is.
        trained: What is trained.
        shards: Of these.
        settings: When updates begin, and of how many backward passes a step is.
        arrays: Of each shard.
    """
    layout = machinery.layout
    wide = settings.accumulate > 1
    itemsizes = tuple(gradient_dtype(each, wide=wide).itemsize for each in trained)
    small = {piece.parameter for shard in shards if shard.block == SMALL for piece in shard.pieces}
    states = [arrays * shard.array_nbytes for shard in shards]
    sizes = [round_up(each.elements * size, ALIGN) for each, size in zip(trained, itemsizes, strict=True)]
    movable: list[int] = []
    room = layout.granted_nbytes
    separate = machinery.device.separate
    behind, pooled = BEHIND, separate and settings.updates == "backward" and not wide
    if separate and settings.updates == "backward":
        more = 0 if wide else _beyond_pool(sizes, blocks_of(trained, shards))
        if more <= room - sum(states) or not more:  # states that all stay save more than waiting gradients do
            room, behind, pooled = room - more, len(trained) + 1, False
    if settings.updates == "step":  # else what waits for its update is counted as it is, and nothing else is kept
        movable = [index for index in range(len(trained)) if index not in small]
        fixed = ShardPipeline.needed_nbytes(shards, arrays) + TrainedWeights.needed_nbytes(machinery)
        each_takes = max((4 + each.parameter.itemsize) * each.elements for each in trained)
        if separate:  # the ring that they leave through
            each_takes += max(2 * each.parameter.nbytes for each in trained)
        fixed += each_takes + 2 * 12 * SUBCHUNK
        room = layout.training_nbytes - fixed - sum(sizes[index] for index in small)
    passing = _passing(itemsizes, frozenset(movable), shards)
    gradients = [sizes[index] for index in movable]
    room = max(room, min(passing, sum(gradients)))  # rounding up to pages may take a little more than was foreseen
    shares = share_out(
        room,
        gradients=gradients,
        gradient_moves=2 * settings.accumulate,
        states=states,
        passing_nbytes=passing,
    )
    spilled = frozenset(index for place, index in enumerate(movable) if place not in shares.gradients)
    stays = sum(states[shard] for shard in shares.states)
    homes = [] if layout.back is None else _homes(layout)
    notes = [f"masters and states: {gib(stays)} of {gib(sum(states))} stay in host memory{_rest(stays < sum(states))}"]
    notes = [*homes, *notes, *([settings.shares.why] if separate and settings.shares.why else [])]
    if movable:
        on_disk, every = sum(sizes[index] for index in spilled), sum(sizes)
        notes.insert(0, f"gradients: {gib(every - on_disk)} of {gib(every)} stay in host memory{_rest(bool(spilled))}")
    return TrainingRoom(
        spilled=spilled,
        itemsizes=itemsizes,
        resident=shares.states,
        on_device=_on_device(shards, shares.states, settings.shares) if separate else frozenset(),
        behind=behind,
        pooled=pooled,
        unused_nbytes=room - shares.nbytes,
        notes=tuple(notes),
    )


def _on_device(shards: Sequence[Shard], resident: frozenset[int], shares: UpdateShares) -> frozenset[int]:
    """The shards that a device updates: so many of those that stay, and so many of the others, spread evenly.

    Not the small tensors, which a step waits for."""
    found: set[int] = set()
    counts = {True: 0, False: 0}
    for shard in shards:
        if shard.block == SMALL:
            continue
        stays = shard.id in resident
        if is_taken(counts[stays], shares.in_memory if stays else shares.on_disk):
            found.add(shard.id)
        counts[stays] += 1
    return frozenset(found)


def _homes(layout: Layout) -> list[str]:
    """A note on weights that stay on a device apart: where new ones come to first."""
    assert layout.back is not None
    there = [block for block in layout.blocks if block.id in layout.front.resident]
    every = sum(block.image.nbytes for block in there)
    homed = sum(block.image.nbytes for block in there if block.id in layout.back.resident)
    rest = ", the rest is written to disk and read each step" if homed < every else ""
    return [f"weights on the device: {gib(homed)} of {gib(every)} are in host memory too, where they change{rest}"]


def blocks_of(trained: Sequence[Trained], shards: Sequence[Shard]) -> list[int]:
    """The block of each parameter."""
    blocks = [SMALL] * len(trained)
    for shard in shards:
        for piece in shard.pieces:
            blocks[piece.parameter] = shard.block
    return blocks


def _beyond_pool(sizes: Sequence[int], blocks: Sequence[int]) -> int:
    """Bytes that places for all gradients take beyond those of a pool."""
    return max(0, sum(sizes) - GradientPool.nbytes(sizes, blocks, slots=POOL, small=SMALL))


def _rest(some: bool) -> str:
    return ", the rest is written and read each step" if some else ""


def _passing(itemsizes: Sequence[int], movable: frozenset[int], shards: Sequence[Shard]) -> int:
    """Buffers that gradients would pass through: those of the ring, and those beside shards that are updated."""

    def nbytes(piece: Piece) -> int:
        return round_up(piece.elements * itemsizes[piece.parameter]) if piece.parameter in movable else 0

    largest = max((nbytes(piece) for shard in shards for piece in shard.pieces), default=0)
    beside = max(sum(nbytes(piece) for piece in shard.pieces) for shard in shards)
    return RING * largest + BUFFERS * beside


def adapter_room(
    trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int
) -> TrainingRoom:
    """That of adapters, which was set aside as a whole: nothing goes to disk before a commit.

    Args:
        trained: What is trained.
        shards: Of these.
        settings: Of how many backward passes a step is.
        arrays: Of each shard.
    """
    stays = sum(arrays * shard.array_nbytes for shard in shards)
    return TrainingRoom(
        spilled=frozenset(),
        itemsizes=tuple(gradient_dtype(each, wide=settings.accumulate > 1).itemsize for each in trained),
        resident=frozenset(shard.id for shard in shards),
        unused_nbytes=0,
        notes=(f"adapters: {gib(stays)} of masters and states stay in host memory",),
    )


def tell(model: nn.Module, machinery: Machinery, room: TrainingRoom) -> None:
    """Put the decision into the model's plan, and give back to the ledger what it has no use for."""
    unused = min(room.unused_nbytes, machinery.layout.granted_nbytes)
    machinery.share.give_back(unused)

    def told(plan: Plan) -> Plan:
        return replace(plan, host_nbytes=plan.host_nbytes - unused, notes=(*plan.notes, *room.notes))

    handle = model.penstock
    handle.plan = told(handle.plan)  # type: ignore[union-attr, arg-type]
    machinery.plan = handle.plan  # type: ignore[union-attr]
