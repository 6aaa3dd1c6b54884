"""Host memory of training: what it takes beside weights, as it is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from torch import nn

from ...kernels.scratch import SUBCHUNK
from ...memory.arena import round_up
from ...scheduler.weighing import Weighing
from ..activations.store import LEAST_BUFFER, MOST_BUFFER, ActivationStore
from ..layout import Changing
from .deviceupdates import DeviceUpdates
from .early import BEHIND, BESIDE
from .pipeline import BUFFERS
from .run import Activations
from .saves import ForwardSaves
from .shards import ELEMENTS, GRAIN
from .spill import RING, WIDE

MOST_SMALL: Final = 1 << 20
"""Bytes of a tensor that may be among the small ones."""
MOST_BLOCK: Final = 32 << 20
"""Bytes of weights: of blocks that are larger, fewer would wait for their update in the same memory."""
POOL: Final = BEHIND + 2
"""Blocks whose gradients have places at a time, where those of a device apart are used as they come: those that wait,
and two that are not whole yet."""
ARRAYS: Final = 3
"""Of a shard, at most: masters and two states."""


def changing(
    weights: Collection[int],
    widest: int,
    *,
    accumulate: int,
    early: bool,
    arrays: int = 0,
    limit: int | None = None,
    separate: bool = False,
    on_device: bool = False,
    activations: Activations = "keep",
    saves: ForwardSaves | None = None,
    weighing: Weighing | None = None,
) -> Changing:
    """Host memory that training takes beside weights of so many bytes each.

    Gradients can go to disk, but for those of the small tensors and the one that was just made; and, where updates
    begin early, those of a few blocks that wait for their update or for being whole. The buffers that shards pass
    through, and gradients beside them; what norms and updates compute with; one buffer that a block of weights is put
    together in, where some do not stay.

    Args:
        weights: Bytes of each.
        widest: Bytes of an element, at most.
        accumulate: Backward passes of a step.
        early: Whether updates begin in backward.
        arrays: Of a shard: masters and states, which may stay in memory where there is room; 0 to leave them on disk.
        limit: What the blocks of a run that goes on were cut by.
        separate: Whether gradients are made on a device apart. They come to pinned memory: to their places there, or
            through a ring where they are added up, or go to disk as they come.
        on_device: Whether that updates some shards.
        activations: What becomes of them. Those that may go to host memory or to disk have a part of what is left.
        saves: What a forward leaves for backward; None where it is not known, and counts as much as the weights.
        weighing: Of a step: whether activations have room before weights.
    """
    total, largest = sum(weights), max(weights, default=0)
    block = max(largest, min(MOST_BLOCK, total // 16) if limit is None else min(limit, total))
    shard = min(ELEMENTS, round_up(total // 2, GRAIN))
    small = min(total // 32, sum(nbytes for nbytes in weights if nbytes <= MOST_SMALL))  # these are updated last
    wide = 2 if accumulate > 1 else 1
    at_once = early and accumulate == 1 and not separate
    """They are gone with their updates: more room is of no use to them, and none is added up or copied."""
    waiting = waiting_blocks(separate=separate) * block if early else 0
    every = wide * total
    element = widest if at_once else WIDE
    least = min(every, wide * (small + waiting) + (RING + BUFFERS) * element * shard)
    if at_once:
        every = least
    ring = 2 * largest if separate and (accumulate > 1 or not early) else 0
    own = least + ring + BUFFERS * ARRAYS * 4 * shard + (1 if at_once else 3) * largest + 2 * 12 * SUBCHUNK + block
    more = every - least + 4 * arrays * (total // 2 + GRAIN * len(weights))  # each begins at a multiple of GRAIN
    moving = activation_room(activations, saves)
    return replace(
        moving,
        own_nbytes=own + moving.own_nbytes,
        moving_nbytes=block,
        more_nbytes=more,
        block_nbytes=block,
        limit_nbytes=limit,
        weighing=weighing,
        own_device_nbytes=DeviceUpdates.needed_nbytes(shard, ARRAYS) if on_device else 0,
    )


def sizes_of(model: nn.Module) -> tuple[list[int], int]:
    """Bytes of each parameter, and of the widest element, as `changing` takes them."""
    parameters = list(model.parameters())
    return [each.nbytes for each in parameters], max((each.itemsize for each in parameters), default=1)


def waiting_blocks(*, separate: bool) -> int:
    """Blocks whose gradients have room at least, where updates begin early: those that wait for that, and for more."""
    return POOL if separate else BESIDE + 1


def with_saves(changing: Changing, saves: ForwardSaves | None, activations: Activations) -> Changing:
    """The same, where it was not known what a forward leaves for backward."""
    if saves is None or changing.saved_nbytes is not None:
        return changing
    return replace(changing, saved_nbytes=saves.movable_nbytes(activations))


def activation_room(activations: Activations, saves: ForwardSaves | None) -> Changing:
    """What activations take of host memory: nothing where they are kept or made again, and buffers where they leave.

    Args:
        activations: What becomes of them.
        saves: What a forward leaves for backward; None where it is not known.
    """
    saved = None if saves is None else saves.movable_nbytes(activations)
    least, most = (ActivationStore.buffers_nbytes(nbytes) for nbytes in (LEAST_BUFFER, MOST_BUFFER))
    if activations == "offload":
        return Changing(own_nbytes=least, block_nbytes=0, saved_nbytes=saved, buffers_nbytes=most - least)
    if activations == "auto":
        return Changing(own_nbytes=0, block_nbytes=0, saved_nbytes=saved, buffers_nbytes=most)
    return Changing(own_nbytes=0, block_nbytes=0)
