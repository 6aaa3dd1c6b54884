"""From prompts to a run: what is checked before anything slow, and the choice of micro-batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..memory.errors import ClosedError, UsageError
from ..memory.trim import map_alone
from ..scheduler.alternation import Alternation
from ..scheduler.microbatches import MEMORY_RATE, MOST_LANES, Footprint, Job, Machine, Schedule, schedule
from ..scheduler.mixture import Mixture
from ..scheduler.plan import Plan
from .build import Machinery
from .deciding import alternation_of
from .experts.layers import shape_of
from .handle import Handle
from .throughput import Work
from .throughput_batch import Row, Ways, ways_of
from .throughput_choice import Choice, Sampling, warpers_for
from .throughput_sizes import footprint_of, free_host_nbytes, with_buffers, with_meetings
from .widening import Products, measure_products, measuring_nbytes

logger = logging.getLogger(__name__)

_DEVICE_MEMORY_RATE: Final = 1e12
"""Bytes per second at which a GPU reads its own memory, roughly; it only ranks choices."""
WORTH_MEASURING: Final = 2e12
"""Operations of a run for which a second of measuring the CPU is little: it takes several seconds at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One prompt."""

    index: int
    """Its number, which its results and its random numbers go by."""
    ids: tuple[int, ...]
    new_tokens: int
    name: str
    """How an error calls it."""

    @property
    def job(self) -> Job:
        """What a schedule needs to know of it."""
        return Job(index=self.index, prompt_tokens=len(self.ids), new_tokens=self.new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the choice of micro-batches is bound to; None is free."""

    room_nbytes: int | None = None
    """Memory for keys, values and activations; None is what is free."""
    rows: int | None = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UsageError(f"rows={self.rows} has no meaning: give 1 or more")
        if self.lanes is not None and not 1 <= self.lanes <= MOST_LANES:
            raise UsageError(f"lanes={self.lanes} has no meaning: give 1 to {MOST_LANES}")


def check_prompts(model: Any, prompts: Sequence[Asked]) -> None:
    """Refuse what `generate` would fail at hours later. Needs no weights: `model` may be on the meta device.

    Raises:
        UsageError: the model does not continue texts; or a prompt is empty, has a token that the model does not know,
            or is too long for it.
    """
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise UsageError(f"a {type(model).__name__} does not continue texts")
    text = model.config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    longest = None if model.config.is_encoder_decoder else getattr(text, "max_position_embeddings", None)
    for asked in prompts:
        tokens, count = len(asked.ids), asked.new_tokens
        if not tokens:
            raise UsageError(f"{asked.name} has no tokens: give a longer text, or leave it out")
        if count < 1:
            raise UsageError(f"{asked.name}: {count} new tokens have no meaning; give 1 or more")
        wrong = next((t for t in asked.ids if t < 0 or (isinstance(vocabulary, int) and t >= vocabulary)), None)
        if wrong is not None:
            raise UsageError(f"{asked.name} has the token {wrong}; the model knows 0 to {(vocabulary or 0) - 1}")
        if isinstance(longest, int) and tokens + count > longest:
            raise UsageError(
                f"{asked.name} has {tokens} tokens; with {count} new ones that is more than the {longest} positions of "
                f"this model: shorten one of them"
            )


def start(
    model: Any,
    prompts: Sequence[Asked],
    sampling: Sampling,
    *,
    limits: Limits,
    choice: Schedule | None = None,
    products: Products | None = None,
) -> Work:
    """Begin to continue prompts, in the micro-batches of `choice`; where it is None, they are chosen within `limits`.

    `products` are what the CPU's take, where that was measured; it is measured now if they are None, it is worth it,
    and there is room for it.

    Raises:
        ClosedError: the model was closed.
        DoesNotFitError: not one prompt at a time fits.
        UsageError: this thread is inside a call of the model.
    """
    handle: Handle = model.penstock
    machinery = handle.machinery
    if handle.closed:
        raise ClosedError("the model was closed by penstock.close(); load it again")
    if machinery is not None and machinery.session.running_here():
        raise UsageError("the model cannot continue other prompts while it runs: call generate_many outside of it")
    map_alone()  # a prefill's activations come and go between keys and values that stay
    ways = ways_of(model)
    warpers = None if sampling.greedy else warpers_for(sampling, model.generation_config)
    rows = [
        Row(
            index=asked.index,
            prompt=asked.ids,
            new_tokens=asked.new_tokens,
            choice=None if warpers is None else Choice(warpers, seed=sampling.seed, index=asked.index),
        )
        for asked in prompts
    ]
    room = _room_nbytes(machinery, limits)
    if products is None:
        products = products_for(model, prompts, room_nbytes=room)
    wide_from = None if products is None or handle.exact or len(prompts) == 1 else products.wide_from
    if choice is None:
        footprint = with_buffers(footprint_of(model.config, model.dtype, reserved=ways.reserves), wide_from)
        choice = _choose(model, ways, prompts, limits, room, footprint, products)
    return Work(model, machinery, choice, rows, ways, wide_from=wide_from)


def products_for(model: Any, prompts: Sequence[Asked], *, room_nbytes: int) -> Products | None:
    """What the CPU's products take, measured in a second; None where another device computes, the run is too short
    for it to matter, or measuring takes more than this room."""
    if model.device.type not in ("cpu", "meta"):
        return None
    tokens = sum(len(asked.ids) + asked.new_tokens for asked in prompts)
    by_inputs = _weights_by_inputs(model)
    if 2 * by_inputs.total() * tokens < WORTH_MEASURING:
        return None
    ((inputs, _),) = by_inputs.most_common(1)
    needed = measuring_nbytes(model.dtype, inputs)
    if room_nbytes < needed:
        logger.info("%d bytes are too little to measure products in, which takes %d", room_nbytes, needed)
        return None
    return measure_products(model.dtype, inputs)


def _weights_by_inputs(model: Any) -> Counter[int]:
    """How many weights have so many inputs each. Some models have their experts as [experts, inputs, outputs]."""
    turned = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "is_transposed", False)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    }
    found: Counter[int] = Counter()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            found[parameter.shape[-2 if id(parameter) in turned else -1]] += parameter.numel()
    return found


def _room_nbytes(machinery: Machinery | None, limits: Limits) -> int:
    """Memory for keys, values and activations, where the model computes."""
    if limits.room_nbytes is not None:
        return limits.room_nbytes
    on_device = None if machinery is None else machinery.device.available_nbytes()
    return free_host_nbytes() if on_device is None else on_device


def _choose(
    model: Any,
    ways: Ways,
    prompts: Sequence[Asked],
    limits: Limits,
    room_nbytes: int,
    footprint: Footprint,
    products: Products | None,
) -> Schedule:
    handle: Handle = model.penstock
    plan, machinery = handle.plan, handle.machinery
    together = not plan.resident and ways.interleaves  # what does not stream has no reads to share
    alternation = _alternation(model, machinery) if machinery is not None and together else None
    mixture = None if machinery is None else _mixture(machinery, plan)
    if machinery is not None and machinery.layout.experts is not None:
        placed = machinery.layout.experts
        footprint = with_meetings(footprint, shape_of(model, placed.layers[0]), placed.routing)
        plan = _without_experts(machinery, plan)
    return schedule(
        [asked.job for asked in prompts],
        footprint,
        Machine(
            room_nbytes=room_nbytes,
            weights_nbytes=plan.weights_nbytes,
            sweep_s=0.0 if plan.resident else plan.with_all_copied().bound_s(),
            mixture=mixture,
            memory_rate=MEMORY_RATE if model.device.type == "cpu" else _DEVICE_MEMORY_RATE,
            products=None if products is None else products.rates,
            alternation=alternation,
            host_room_nbytes=None if alternation is None or machinery is None else _host_room_nbytes(machinery),
        ),
        pads=ways.pads,
        rows=limits.rows,
        lanes=limits.lanes if together else 1,
    )


def _without_experts(machinery: Machinery, plan: Plan) -> Plan:
    """The plan, as far as it moves anything but experts."""
    assert machinery.layout.experts is not None
    routing = machinery.layout.experts.routing
    copied = plan.expert_copied_nbytes or round(_copied_nbytes(machinery) * routing.top_k / routing.experts)
    return replace(
        plan,
        disk_nbytes_per_sweep=max(0, plan.disk_nbytes_per_sweep - plan.expert_read_nbytes),
        link_nbytes_per_sweep=max(0, plan.link_nbytes_per_sweep - copied),
    )


def _mixture(machinery: Machinery, plan: Plan) -> Mixture | None:
    """Experts that are blocks of their own, with what a sweep over all of them takes longer than one over none."""
    experts = machinery.layout.experts
    if experts is None:
        return None
    rest = _without_experts(machinery, plan)
    every = replace(
        rest,
        disk_nbytes_per_sweep=rest.disk_nbytes_per_sweep + round(experts.read_for_all),
        link_nbytes_per_sweep=rest.link_nbytes_per_sweep + round(_copied_nbytes(machinery)),
    )
    return Mixture(
        share=experts.routing.top_k / experts.routing.experts,
        nbytes=sum(block.image.data_nbytes for block in machinery.layout.blocks[experts.first :]),
        sweep_s=every.with_all_copied().bound_s() - rest.with_all_copied().bound_s(),
    )


def _copied_nbytes(machinery: Machinery) -> float:
    """Bytes copied to a device apart in a sweep that uses all experts."""
    layout = machinery.layout
    if layout.experts is None or layout.back is None:
        return 0.0
    return layout.experts.missed * sum(block.image.data_nbytes for block in layout.blocks[layout.experts.first :])


def _host_room_nbytes(machinery: Machinery) -> int:
    """Host memory for the keys and values of what the CPU computes: what the budget leaves, where one was named, of
    what is free."""
    left = machinery.host_left_nbytes
    return free_host_nbytes() if left is None else min(left, free_host_nbytes())


def _alternation(model: Any, machinery: Machinery) -> Alternation | None:
    """What two processors take; None where there is one, or it is not known."""
    if not machinery.units.on_cpu or machinery.costs is None or machinery.plan is None:
        return None
    return alternation_of(model, machinery.layout, machinery.units, machinery.plan, machinery.costs)
