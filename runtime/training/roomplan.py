"""What of gradients and states stays in host memory, in the room that weights have left for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ...kernels.scratch import SUBCHUNK
from ...memory.arena import round_up
from ...memory.image import ALIGN
from ...scheduler.plan import Plan
from ...scheduler.sharing import is_taken, share_out
from ...scheduler.updating import UpdateShares
from ..activations.store import LEAST_BUFFER, ActivationStore
from ..build import Machinery
from ..explain import gib, seconds
from ..layout import Layout
from .early import BEHIND, BESIDE
from .pipeline import BUFFERS, ShardPipeline
from .room import waiting_blocks
from .run import Settings
from .shards import SMALL, Piece, Shard
from .spill import RING
from .trained import Trained, gradient_dtype
from .weights import TrainedWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRoom:
    """The decision. Parameters by their number among those that are trained."""

    spilled: frozenset[int]
    """Parameters whose gradients have no place of their own in memory: they go to disk, or to updates at once."""
    itemsizes: tuple[int, ...]
    """Bytes of an element of each parameter's gradient, at most."""
    resident: frozenset[int]
    """Shards that stay."""
    on_device: frozenset[int] = frozenset()
    """Shards that a device apart updates."""
    behind: int = BEHIND
    """Blocks whose gradients may wait for their update, where backward begins them; all of them, where these have
    places of their own on the way from a device apart."""
    activations_nbytes: int
    """For activations that do not stay on the tier that computes, and the buffers that they pass through."""
    gradients_on_disk_nbytes: int
    states_on_disk_nbytes: int
    states_over_link_nbytes: int = 0
    """That a step sends to a device apart, and back."""
    unused_nbytes: int
    """Of the room, what is of no use to training."""
    notes: tuple[str, ...]
    """For the plan."""

    def not_taken(self, layout: Layout) -> int:
        """Of what a layout has granted, what training has no use for."""
        return min(self.unused_nbytes, layout.granted_nbytes)

    def told(self, plan: Plan, layout: Layout) -> Plan:
        """A plan with the decision in it."""
        return replace(plan, host_nbytes=plan.host_nbytes - self.not_taken(layout), notes=(*plan.notes, *self.notes))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Bytes of what could stay."""

    itemsizes: tuple[int, ...]
    gradients: Sequence[int]
    """Of each parameter."""
    movable: Sequence[int]
    """Those of them that could be elsewhere: not those of small tensors."""
    every: int
    """Of all these."""
    passing: int
    """Of the buffers that they would pass through."""
    waiting: int
    """Of those that wait for early updates, or for being whole."""
    states: Sequence[int]
    """Of each shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """What there is for gradients and states."""

    nbytes: int
    kept: Sequence[int] = ()
    """Gradients that may have a part of it."""
    least: int = 0
    """Of it, what these have at least."""
    spilled: frozenset[int] = frozenset()
    """Parameters, of gradients that have none."""


def moves_activations(layout: Layout, settings: Settings, *, frozen: bool) -> bool:
    """Whether a plan decides about activations. By itself only where memory is short: else they are kept.

    Args:
        layout: Of the model.
        settings: Of the run.
        frozen: Whether weights are, and adapters trained, all of which is in memory.
    """
    if settings.activations != "auto":
        return settings.activations == "offload"
    if frozen or layout.back is not None:
        return not layout.resident
    return not layout.resident or not layout.all_granted


def plan_room(
    layout: Layout,
    trained: Sequence[Trained],
    shards: Sequence[Shard],
    settings: Settings,
    *,
    arrays: int,
    saved_is_known: bool,
) -> TrainingRoom:
    """Share out what a layout has set aside for training.

    Args:
        layout: Says how much there is.
        trained: What is trained.
        shards: Of these.
        settings: When updates begin, and of how many backward passes a step is.
        arrays: Of each shard.
        saved_is_known: Whether the layout knows what a forward saves, rather than counts it as much as the weights.
    """
    separate = layout.back is not None
    early, wide = settings.updates == "backward", settings.accumulate > 1
    sizes = _sizes(trained, shards, settings, arrays=arrays, separate=separate)
    buffers = ActivationStore.buffers_nbytes(LEAST_BUFFER) if settings.activations == "offload" else 0
    at_once = early and not wide
    room = _of_early(layout, sizes, buffers) if at_once else _of_sums(layout, trained, sizes, buffers, early=early)
    left = _room_of_activations(layout, settings, room, saved_is_known=saved_is_known)
    room, activations = replace(room, nbytes=room.nbytes - left), buffers + left
    if separate and at_once:
        room = _all_wait(room, sizes)
    shares = share_out(
        room.nbytes,
        gradients=room.kept,
        gradient_moves=2 * (settings.accumulate - 1 if early and wide else settings.accumulate),
        states=sizes.states,
        passing_nbytes=sizes.passing,
    )
    unused = room.nbytes - shares.nbytes
    if settings.activations == "auto" and not layout.resident:
        more = min(unused, max(layout.saved_nbytes - activations, 0))
        activations += more
        unused -= more
    spilled = room.spilled
    if room.kept:
        spilled = frozenset(index for place, index in enumerate(sizes.movable) if place not in shares.gradients)
    there = _on_device(shards, shares.states, settings.shares) if separate else frozenset()
    return TrainingRoom(
        spilled=spilled,
        itemsizes=sizes.itemsizes,
        resident=shares.states,
        on_device=there,
        behind=BESIDE if not separate else BEHIND if spilled else len(trained) + 1,
        activations_nbytes=activations,
        gradients_on_disk_nbytes=sum(sizes.gradients[index] for index in spilled),
        states_on_disk_nbytes=sum(sizes.states) - sum(sizes.states[shard] for shard in shares.states),
        states_over_link_nbytes=sum(sizes.states[shard] for shard in there),
        unused_nbytes=unused,
        notes=_notes(layout, settings, sizes, shares.states, spilled if room.kept else None),
    )


def _sizes(
    trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int, separate: bool
) -> _Sizes:
    itemsizes = tuple(gradient_dtype(each, wide=settings.accumulate > 1).itemsize for each in trained)
    small = {piece.parameter for shard in shards if shard.block == SMALL for piece in shard.pieces}
    gradients = [round_up(each.elements * size, ALIGN) for each, size in zip(trained, itemsizes, strict=True)]
    movable = [index for index in range(len(trained)) if index not in small]
    waiting = waiting_blocks(separate=separate) * _largest(gradients, shards) if settings.updates == "backward" else 0
    return _Sizes(
        itemsizes=itemsizes,
        gradients=gradients,
        movable=movable,
        every=sum(gradients[index] for index in movable),
        passing=_passing(itemsizes, frozenset(movable), shards),
        waiting=waiting,
        states=[arrays * shard.array_nbytes for shard in shards],
    )


def _of_early(layout: Layout, sizes: _Sizes, buffers: int) -> _Room:
    """Where gradients are gone with their updates, but for those that have to wait for step(): these have what is set
    aside for what waits, and go to disk beyond."""
    beyond = sizes.every > sizes.waiting + sizes.passing
    return _Room(nbytes=max(layout.granted_nbytes - buffers, 0), spilled=frozenset(sizes.movable if beyond else ()))


def _of_sums(layout: Layout, trained: Sequence[Trained], sizes: _Sizes, buffers: int, *, early: bool) -> _Room:
    """Where gradients stay until the step, or until the last of several passes."""
    fixed = ShardPipeline.needed_nbytes(sizes.states) + TrainedWeights.needed_nbytes(layout)
    fixed += max((4 + each.parameter.itemsize) * each.elements for each in trained) + 2 * 12 * SUBCHUNK
    if layout.back is not None:  # the ring that they leave through
        fixed += max(2 * each.parameter.nbytes for each in trained)
    fixed += sum(sizes.gradients) - sizes.every
    room = layout.training_nbytes - fixed - buffers
    if early and sizes.every > room:  # sums that all stay wait where they are
        room -= sizes.waiting
    least = min(sizes.passing, sizes.every)
    room = max(room, least)  # rounding up to pages may take a little more than was foreseen
    return _Room(nbytes=room, kept=[sizes.gradients[index] for index in sizes.movable], least=least)


def _room_of_activations(layout: Layout, settings: Settings, room: _Room, *, saved_is_known: bool) -> int:
    """What they have of it beside their buffers: before states, and after gradients, but for what they have before
    weights.

    Where one memory is for all, a byte of a layer's products saves more than one of state does: of the first, a matrix
    n rows long makes n operations a byte, of the second, a drive moves two bytes that the same cores submit and sum up.
    Beside a device apart with "auto", they have what states leave. Where it is not known what a forward saves, they
    have half of what gradients leave; what was weighed counts the tokens of a batch, and is had whole.
    """
    decided = moves_activations(layout, settings, frozen=False)
    if not decided or (settings.activations == "auto" and layout.back is not None):
        return 0
    before = 0 if layout.before is None else layout.before.nbytes
    free = max(0, room.nbytes - max(room.least, sum(room.kept)))
    left = max(0, min(before, room.nbytes - room.least), free if saved_is_known else free // 2)
    return min(layout.saved_nbytes, left)


def _all_wait(room: _Room, sizes: _Sizes) -> _Room:
    """Places for all gradients from a device apart, if the room has them beside all states, which save more."""
    more = max(0, sizes.every - sizes.waiting - sizes.passing)
    if more > max(0, room.nbytes - sum(sizes.states)):
        return room
    return replace(room, nbytes=room.nbytes - more, spilled=frozenset())


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


def _notes(
    layout: Layout, settings: Settings, sizes: _Sizes, resident: frozenset[int], spilled: frozenset[int] | None
) -> tuple[str, ...]:
    """What was decided, in sentences; `spilled`: None where gradients are gone with their updates."""
    notes = [] if settings.saves is None else [settings.saves.told()]
    if layout.back is not None:
        notes.append(_homes(layout, layout.back.resident))
    decided = moves_activations(layout, settings, frozen=False)
    if (before := layout.before) is not None and decided and (spilled is not None or not layout.resident):
        notes.append(
            f"room: activations have {gib(before.nbytes)} before weights and gradients: computing or the drive, "
            f"whichever is longer, takes {seconds(before.seconds)} of a step so, "
            f"and {seconds(before.without_s)} without"
        )
    if spilled is not None:
        on_disk, every = sum(sizes.gradients[index] for index in spilled), sum(sizes.gradients)
        notes.append(f"gradients: {gib(every - on_disk)} of {gib(every)} stay in host memory{_rest(bool(spilled))}")
    stays, states = sum(sizes.states[shard] for shard in resident), sum(sizes.states)
    notes.append(f"masters and states: {gib(stays)} of {gib(states)} stay in host memory{_rest(stays < states)}")
    if layout.back is not None and settings.shares.why:
        notes.append(settings.shares.why)
    return tuple(notes)


def _homes(layout: Layout, in_host: frozenset[int]) -> str:
    """On weights that stay on a device apart: where new ones come to first."""
    there = [block for block in layout.blocks if block.id in layout.front.resident]
    every = sum(block.image.nbytes for block in there)
    homed = sum(block.image.nbytes for block in there if block.id in in_host)
    rest = ", the rest is written to disk and read each step" if homed < every else ""
    return f"weights on the device: {gib(homed)} of {gib(every)} are in host memory too, where they change{rest}"


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
    layout: Layout, trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int
) -> TrainingRoom:
    """That of adapters, which was set aside as a whole: nothing of theirs goes to disk before a commit.

    Args:
        layout: What weights have left in it is for activations.
        trained: What is trained.
        shards: Of these.
        settings: Of how many backward passes a step is.
        arrays: Of each shard.
    """
    stays = sum(arrays * shard.array_nbytes for shard in shards)
    granted, activations = layout.granted_nbytes, 0
    if settings.activations == "offload":
        activations = granted + ActivationStore.buffers_nbytes(LEAST_BUFFER)
    elif settings.activations == "auto" and not layout.resident:
        activations = granted
    return TrainingRoom(
        spilled=frozenset(),
        itemsizes=tuple(gradient_dtype(each, wide=settings.accumulate > 1).itemsize for each in trained),
        resident=frozenset(shard.id for shard in shards),
        activations_nbytes=activations,
        gradients_on_disk_nbytes=0,
        states_on_disk_nbytes=0,
        unused_nbytes=0 if activations else granted,
        notes=(
            *([] if settings.saves is None else [settings.saves.told()]),
            f"adapters: {gib(stays)} of masters and states stay in host memory",
        ),
    )


def tell(model: nn.Module, machinery: Machinery, room: TrainingRoom) -> None:
    """Put the decision into the model's plan, and give back to the ledger what it has no use for."""
    machinery.share.give_back(room.not_taken(machinery.layout))
    handle = model.penstock
    handle.plan = room.told(handle.plan, machinery.layout)  # type: ignore[union-attr, arg-type]
    machinery.plan = handle.plan  # type: ignore[union-attr]
