"""A model loaded for many prompts: what memory sequences get is taken from the weights before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..api import load_for_lanes
from ..budget import MemoryBudget, parse_budget
from ..memory.errors import DoesNotFitError
from ..runtime.pretrained import outline
from ..runtime.throughput_batch import ways_of
from ..runtime.throughput_sizes import (
    footprint_of,
    free_host_nbytes,
    rehearsed_footprint,
    with_buffers,
    with_mixture,
)
from ..runtime.throughput_start import Asked, check_prompts, products_for
from ..runtime.widening import Products
from ..scheduler.microbatches import MOST_LANES, Footprint, Machine, Schedule, schedule
from .prompts import ManyRequest

_TRIES: Final = 3
_LANES: Final = 2
"""Micro-batches that such a device is planned for: as few as keep both processors busy."""
_BATCH: Final = 32
"""Sequences to leave room for in the automatic budgets of a device with memory of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The model, and how its memory was shared out."""

    model: Any
    choice: Schedule | None
    """None: to be chosen for what is free now."""
    products: Products | None = None
    """What the CPU's take, where it was measured."""


def load_for(request: ManyRequest, folder: str, prompts: Sequence[Asked]) -> Loaded:
    """Check the prompts against the config, choose micro-batches, and load the model into what they leave.

    Raises:
        UsageError: a prompt is too long for the model, or it does not continue texts.
        DoesNotFitError: the model and one prompt at a time do not fit together.
    """
    bones = outline(folder, dtype=request.dtype, trust_remote_code=request.trust_remote_code)
    check_prompts(bones, prompts)
    longest = max(len(asked.ids) + asked.new_tokens for asked in prompts)
    if request.device != "cpu" and not (request.device == "auto" and not torch.cuda.is_available()):
        model = _load(
            request, folder, parse_budget(request.max_memory), context=longest, batch=min(_BATCH, len(prompts))
        )
        return Loaded(model=model, choice=None)
    reserved = ways_of(bones).reserves
    footprint = rehearsed_footprint(
        folder,
        footprint_of(bones.config, bones.dtype, reserved=reserved),
        tokens=longest,
        dtype=request.dtype,
        on_cpu=True,
        trust_remote_code=request.trust_remote_code,
        reserved=reserved,
    )
    weights = sum(parameter.nbytes for parameter in bones.parameters())
    return _shared(request, folder, prompts, footprint, weights, bones)


def _shared(
    request: ManyRequest, folder: str, prompts: Sequence[Asked], footprint: Footprint, weights_nbytes: int, bones: Any
) -> Loaded:
    """Load on the CPU, where weights and sequences share the host. What the model needs to run at all is known when it
    has been refused less."""
    budget = parse_budget(request.max_memory)
    room = free_host_nbytes() if budget.host is None else budget.host
    ways = ways_of(bones)
    jobs = [asked.job for asked in prompts]
    products = products_for(bones, prompts, room_nbytes=room)
    footprint = with_buffers(footprint, None if products is None or len(prompts) == 1 else products.wide_from)
    rates = None if products is None else products.rates
    footprint, mixture = with_mixture(footprint, bones)
    least = 0
    for _ in range(_TRIES):
        choice = schedule(
            jobs,
            footprint,
            Machine(
                room_nbytes=room,
                weights_nbytes=weights_nbytes,
                sweep_s=None,
                least_weights_nbytes=least,
                products=rates,
                mixture=mixture,
            ),
            pads=ways.pads,
            most_lanes=MOST_LANES if ways.interleaves else 1,
        )
        share = MemoryBudget(host=room - choice.nbytes, device=budget.device, disk=budget.disk)
        try:
            model = _load(request, folder, share, context=None, batch=None)
            return Loaded(model=model, choice=choice, products=products)
        except DoesNotFitError as error:
            if error.tier != "host" or error.needed_nbytes <= least:
                raise
            least, refused = error.needed_nbytes, error
    raise refused


def _load(request: ManyRequest, folder: str, budget: MemoryBudget, *, context: int | None, batch: int | None) -> Any:
    tiers = {"host": budget.host, "device": budget.device, "disk": budget.disk}
    return load_for_lanes(
        folder,
        max_memory={tier: nbytes for tier, nbytes in tiers.items() if nbytes is not None} or "auto",
        device=request.device,
        dtype=request.dtype,
        disk=request.disk,
        context=context,
        batch=batch,
        exact=False,
        plan=None,
        trust_remote_code=request.trust_remote_code,
        lanes=1 if batch is None else min(_LANES, batch),
    )
