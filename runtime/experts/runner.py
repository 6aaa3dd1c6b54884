"""Experts of a streamed model while it runs: leased expert by expert, once the router has decided."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ...memory.arena import AnyArena
from ...scheduler.executor import Executor
from ...scheduler.experts.ahead import LookAhead
from ...scheduler.experts.cache import CacheSetting
from ...scheduler.experts.costs import ExpertCosts
from ...scheduler.experts.events import event_of
from ...scheduler.experts.layerscheduler import LayerScheduler
from ...scheduler.experts.policies import DEFAULT, policy
from ...scheduler.experts.pool import ExpertPool, LayerPass, PoolStatistics
from ...scheduler.experts.trace import Ids
from ..binding import contiguous_stride, view_of
from ..devices.base import Device
from ..dtypes import torch_dtype
from .grouped import Grouped
from .placed import PlacedExperts
from .routers import RouterTap, candidates
from .steps import StepOf, step_of

if TYPE_CHECKING:
    from ..layout import Layout

IMPLEMENTATION: Final = "penstock"
"""Our name in transformers' registry of experts functions."""
_MARK: Final = "_penstock_experts"


class ExpertRunner:
    """Computes the expert layers of one model.

    Args:
        layout: Has experts.
        arena: Slots are cut from it.
        device: That computes.
        executor: Brings experts.
    """

    def __init__(self, layout: Layout, arena: AnyArena, device: Device, executor: Executor) -> None:
        assert layout.experts is not None
        self._placed: PlacedExperts = layout.experts
        self._device = device
        self._memory = device.tensor(arena)
        self._places = {
            block.id: next(iter((block.device_image or block.image).places.values()))
            for block in layout.blocks[self._placed.first :]
        }
        count = self._placed.capacity + self._placed.passing
        routing = self._placed.routing
        self.pool = ExpertPool(
            routing=routing,
            setting=CacheSetting(capacity=self._placed.capacity),
            policy=policy(DEFAULT, routing),
            blocks=self._placed.blocks,
            slots=[[arena.cut(nbytes) for _ in range(count)] for nbytes in self._placed.slot_nbytes],
            carrier=executor,
            expert_nbytes=self._placed.read_nbytes,
        )
        self._turn = threading.Lock()
        self._calls = threading.local()
        self._steps = 0
        self._tap: RouterTap | None = None
        self._ahead: LookAhead | None = None
        self._streams_others = layout.front.slots > 0

    def statistics(self) -> PoolStatistics:
        """What the cache of experts did so far."""
        found = self.pool.statistics()
        return found if self._ahead is None else replace(found, prefetching=self._ahead.statistics())

    def look_ahead(self, costs: ExpertCosts) -> None:
        """Bring experts before their layer asks, where that gains time by these costs of one tier.

        Not where other blocks are streamed, as the drive is never idle then, nor where there is no room beside what
        passes.
        """
        if not self._streams_others and self.pool.spare > 0 and costs.read_s > 0:
            self._ahead = LookAhead(self.pool, LayerScheduler(costs), clock=time.monotonic)

    def install(self, module: nn.Module) -> None:
        """Have transformers call this for the layers whose experts are blocks."""
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
        self._tap = RouterTap(module, self._placed.layers, self._placed.routing.experts)
        for number, layer in enumerate(self._placed.layers):
            child: Any = module.get_submodule(layer.path)
            child.__dict__[_MARK] = (self, number)
            child.config._experts_implementation = {"": IMPLEMENTATION}  # and not that of configs below it

    def begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A root call of this thread starts: what its layers will be part of."""
        self._steps += 1
        self._calls.step = step_of(self._steps - 1, args, kwargs)

    def forward(
        self, number: int, module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] What a layer's experts make of its tokens; arguments as transformers gives them."""
        routing = self._placed.routing
        tokens = Grouped(hidden, chosen, weights, routing.experts)
        step: StepOf = getattr(self._calls, "step", None) or StepOf(number=self._steps, sequences=None)
        phase = step.phase(len(hidden), routing)
        if not len(hidden):
            return torch.zeros_like(hidden)
        near, scores = self._scores(number, chosen, weights)
        guesses = self._guesses(number, hidden) if phase == "decode" else None
        event = event_of(
            step=step.number,
            layer=number,
            phase=phase,
            experts=routing.experts,
            chosen=chosen.cpu().numpy(),
            candidates=near.cpu().numpy(),
            scores=scores.cpu().numpy(),
            guesses=guesses,
        )
        with self._turn, self.pool.layer(event) as run:
            if self._ahead is not None:
                self._ahead.begun(event, run.there)
            result = tokens.compute(module, run.order, partial(self._weight, run))
            if self._ahead is not None:
                self._ahead.ended(event)
        return result

    def _guesses(self, number: int, hidden: torch.Tensor) -> Ids | None:
        """[T, K] What the router of the next layer says of this layer's tokens, if somebody wants to know it."""
        routing, tap = self._placed.routing, self._tap
        if self._ahead is None or tap is None or number + 1 == routing.layers:
            return None
        logits = tap.ask(number + 1, hidden)
        return None if logits is None else logits.topk(routing.top_k, dim=-1).indices.cpu().numpy().astype(np.uint16)

    def _scores(self, number: int, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, W] Experts that the router gave a score, and the scores: of those that it chose alone, if no more is
        known."""
        logits = None if self._tap is None else self._tap.take(number, len(chosen))
        if logits is None:
            return chosen, weights.detach().float().abs()
        routing = self._placed.routing
        return candidates(chosen, logits, min(2 * routing.top_k, routing.experts))

    @contextmanager
    def _weight(self, run: LayerPass, part: int, expert: int) -> Iterator[torch.Tensor]:
        """The weight of one part of one expert."""
        with run.lent(part, expert, self._device.computed) as lease:
            residence = lease.residence
            self._device.compute_waits(residence.event)
            residence.slot.check_stamp(lease.block)
            place = self._places[lease.block]
            dtype = torch_dtype(place.dtype)
            view = view_of(self._memory, residence.slot.offset, place, dtype, contiguous_stride(place.shape))
            yield view[0]

    def close(self) -> None:
        """Let go of the memory, and of the routers."""
        if self._tap is not None:
            self._tap.close()
        self._memory = torch.empty(0)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls for a layer of experts: ours where the layer is streamed by expert, else its own.

    Where gradients pass through, weights would have to stay until backward: the whole layer is gathered, beyond the
    budget.
    """
    found = module.__dict__.get(_MARK)
    passes = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    if found is None or passes:
        whole: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return whole
    runner, number = found
    result: torch.Tensor = runner.forward(number, module, hidden_states, top_k_index, top_k_weights)
    return result
