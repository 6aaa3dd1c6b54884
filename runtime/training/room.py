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
from ...scheduler.sharing import share_out
from ..activations.store import LEAST_BUFFER, MOST_BUFFER, ActivationStore
from ..build import Machinery
from ..explain import gib
from ..layout import Changing
from .early import BEHIND
from .gradients import Trained, gradient_dtype
from .pipeline import BUFFERS, ShardPipeline
from .run import Activations, Settings
from .shards import ELEMENTS, GRAIN, Piece, Shard
from .spill import RING, WIDE
from .updater import SMALL
from .weights import TrainedWeights

MOST_BLOCK: Final = 64 << 20
ARRAYS: Final = 3
"""Of a shard, at most: masters and two states."""


def changing(
    weights: Collection[int],
    *,
    accumulate: int,
    early: bool,
    arrays: int = 0,
    limit: int | None = None,
    activations: Activations = "keep",
    saved_nbytes: int | None = None,
) -> Changing:
    """Host memory that training takes beside weights of so many bytes each.

    Gradients can go to disk, but for those of the small tensors and the one that was just made; and, where updates
    begin early, those of a few blocks that wait for their update or for being whole. The buffers that shards pass
    through, and gradients beside them; what norms and updates compute with; one buffer that a block of weights is put
    together in.

    Args:
        weights: Bytes of each.
        accumulate: Backward passes of a step.
        early: Whether updates begin in backward.
        arrays: Of a shard: masters and states, which may stay in memory where there is room; 0 to leave them on disk.
        limit: What the blocks of a run that goes on were cut by.
        activations: What becomes of them. Those that may go to host memory or to disk have a part of what is left.
        saved_nbytes: Of what a forward saves; None where it is not known, and counts as much as the weights.
    """
    total, largest = sum(weights), max(weights, default=0)
    block = max(largest, min(MOST_BLOCK, total // 16) if limit is None else min(limit, total))
    shard = min(ELEMENTS, round_up(total // 2, GRAIN))
    small = total // 32  # these are updated last
    wide = 2 if accumulate > 1 else 1
    waiting = (BEHIND + 1) * block if early else 0
    every = wide * total
    least = min(every, wide * (small + waiting) + (RING + BUFFERS) * WIDE * shard)
    if early and accumulate == 1:
        every = least  # they are gone with their updates: more room is of no use to them
    own = least + BUFFERS * ARRAYS * 4 * shard + 3 * largest + 2 * 12 * SUBCHUNK + block
    more = every - least + 4 * arrays * (total // 2 + GRAIN * len(weights))  # each begins at a multiple of GRAIN
    moving = activation_room(activations, saved_nbytes)
    return replace(
        moving,
        own_nbytes=own + moving.own_nbytes,
        more_nbytes=more,
        block_nbytes=block,
        limit_nbytes=limit,
    )


def activation_room(activations: Activations, saved_nbytes: int | None) -> Changing:
    """What activations take of host memory: nothing where they are kept or made again, and buffers where they leave.

    Args:
        activations: What becomes of them.
        saved_nbytes: Of what a forward saves; None where it is not known.
    """
    least, most = (ActivationStore.buffers_nbytes(nbytes) for nbytes in (LEAST_BUFFER, MOST_BUFFER))
    if activations == "offload":
        return Changing(own_nbytes=least, block_nbytes=0, saved_nbytes=saved_nbytes, buffers_nbytes=most - least)
    if activations == "auto":
        return Changing(own_nbytes=0, block_nbytes=0, saved_nbytes=saved_nbytes, buffers_nbytes=most)
    return Changing(own_nbytes=0, block_nbytes=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRoom:
    """The decision. Parameters by their number among those that are trained."""

    spilled: frozenset[int]
    """Parameters whose gradients go to disk."""
    itemsizes: tuple[int, ...]
    """Bytes of an element of each parameter's gradient, at most."""
    resident: frozenset[int]
    """Shards that stay."""
    activations_nbytes: int
    """For activations that do not stay on the tier that computes, and the buffers that they pass through."""
    gradients_on_disk_nbytes: int
    states_on_disk_nbytes: int
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
    movable = [index for index in range(len(trained)) if index not in small]
    gradients = [sizes[index] for index in movable]
    every, passing = sum(gradients), _passing(itemsizes, frozenset(movable), shards)
    early = settings.updates == "backward"
    spilled: frozenset[int] = frozenset()
    waiting = (BEHIND + 1) * _largest(sizes, shards) if early else 0
    buffers = ActivationStore.buffers_nbytes(LEAST_BUFFER) if settings.activations == "offload" else 0
    if early and not wide:
        # Gradients are gone with their updates, but for those that have to wait for step(): these have what is set
        # aside for what waits, and go to disk beyond.
        spilled = frozenset(movable if every > waiting + passing else ())
        room, kept, least = max(layout.granted_nbytes - buffers, 0), [], 0
    else:
        fixed = ShardPipeline.needed_nbytes(shards, arrays) + TrainedWeights.needed_nbytes(machinery)
        fixed += max((4 + each.parameter.itemsize) * each.elements for each in trained) + 2 * 12 * SUBCHUNK
        room, kept = layout.training_nbytes - fixed - buffers - sum(sizes[index] for index in small), gradients
        room -= waiting if every > room else 0  # sums that all stay wait where they are
        least = min(passing, every)
        room = max(room, least)  # rounding up to pages may take a little more than was foreseen
    activations = buffers
    if settings.activations == "offload":  # they come before states, and after gradients
        left = max(0, room - max(least, sum(kept)))
        known = machinery.changing is not None and machinery.changing.saved_nbytes is not None
        activations += min(layout.saved_nbytes, left if known else left // 2)
        room -= activations - buffers
    shares = share_out(
        room,
        gradients=kept,
        gradient_moves=2 * (settings.accumulate - 1 if early and wide else settings.accumulate),
        states=states,
        passing_nbytes=passing,
    )
    unused = room - shares.nbytes
    if settings.activations == "auto" and not layout.resident:
        activations = min(unused, layout.saved_nbytes)
        unused -= activations
    if kept:
        spilled = frozenset(index for place, index in enumerate(movable) if place not in shares.gradients)
    stays = sum(states[shard] for shard in shares.states)
    notes = [f"masters and states: {gib(stays)} of {gib(sum(states))} stay in host memory{_rest(stays < sum(states))}"]
    if kept:
        on_disk, every = sum(sizes[index] for index in spilled), sum(sizes)
        notes.insert(0, f"gradients: {gib(every - on_disk)} of {gib(every)} stay in host memory{_rest(bool(spilled))}")
    return TrainingRoom(
        spilled=spilled,
        itemsizes=itemsizes,
        resident=shares.states,
        activations_nbytes=activations,
        gradients_on_disk_nbytes=sum(sizes[index] for index in spilled),
        states_on_disk_nbytes=sum(states) - stays,
        unused_nbytes=unused,
        notes=tuple(notes),
    )


def _largest(sizes: Sequence[int], shards: Sequence[Shard]) -> int:
    """Bytes of the gradients of the block that has most."""
    blocks: dict[int, set[int]] = {}
    for shard in shards:
        blocks.setdefault(shard.block, set()).update(piece.parameter for piece in shard.pieces)
    return max((sum(sizes[i] for i in indices) for block, indices in blocks.items() if block != SMALL), default=0)


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
    machinery: Machinery, trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int
) -> TrainingRoom:
    """That of adapters, which was set aside as a whole: nothing of theirs goes to disk before a commit.

    Args:
        machinery: Of the model; what weights have left is for activations.
        trained: What is trained.
        shards: Of these.
        settings: Of how many backward passes a step is.
        arrays: Of each shard.
    """
    stays = sum(arrays * shard.array_nbytes for shard in shards)
    granted, activations = machinery.layout.granted_nbytes, 0
    if settings.activations == "offload":
        activations = granted + ActivationStore.buffers_nbytes(LEAST_BUFFER)
    elif settings.activations == "auto" and not machinery.layout.resident:
        activations = granted
    return TrainingRoom(
        spilled=frozenset(),
        itemsizes=tuple(gradient_dtype(each, wide=settings.accumulate > 1).itemsize for each in trained),
        resident=frozenset(shard.id for shard in shards),
        activations_nbytes=activations,
        gradients_on_disk_nbytes=0,
        states_on_disk_nbytes=0,
        unused_nbytes=0 if activations else granted,
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
