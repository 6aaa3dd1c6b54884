"""Experts of a streamed model while it runs: leased expert by expert, once the router has decided."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ...memory.arena import AnyArena, Slot
from ...memory.image import Place
from ...scheduler.cost import CostModel
from ...scheduler.executor import Executor
from ...scheduler.experts.account import PoolStatistics
from ...scheduler.experts.ahead import LookAhead
from ...scheduler.experts.cache import CacheSetting
from ...scheduler.experts.costs import ExpertCosts
from ...scheduler.experts.events import Event, event_of, merged, with_guesses
from ...scheduler.experts.forecast import NEVER_S, ExpertForecast, expected_trace
from ...scheduler.experts.layerpass import LayerPass
from ...scheduler.experts.layerscheduler import LayerScheduler
from ...scheduler.experts.policies import DEFAULT, policy
from ...scheduler.experts.pool import ExpertPool
from ...scheduler.experts.shape import ExpertShape
from ...scheduler.experts.shelf import HostShelf
from ...scheduler.experts.trace import Ids
from ..binding import contiguous_stride, view_of
from ..devices.base import Device
from ..dtypes import torch_dtype
from ..sweep import Sweep
from .grouped import Grouped, compute_together
from .implementation import AROUND, IMPLEMENTATION, put_back, take_over
from .layers import shape_of
from .outlook import outlook_of
from .placed import PlacedExperts
from .routers import RouterTap, candidates
from .split import Split, splittable
from .steps import StepOf, step_of

if TYPE_CHECKING:
    from ..layout import Layout

_MARK: Final = "_penstock_experts"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Asked:
    """A call of one layer."""

    tokens: Grouped
    hidden: torch.Tensor
    """[T, H] The same, as they come."""
    event: Event


class ExpertRunner:
    """Computes the expert layers of one model.

    Args:
        layout: Has experts.
        arena: Slots are cut from it.
        host: Of the host's memory; `arena` where that computes.
        device: That computes.
        executor: Brings experts.
        sweep_here: The sweep that the calling thread is a member of.
    """

    def __init__(
        self,
        layout: Layout,
        arena: AnyArena,
        host: AnyArena,
        device: Device,
        executor: Executor,
        sweep_here: Callable[[], Sweep | None],
    ) -> None:
        assert layout.experts is not None
        self._leases = layout.leases
        self._sweep_here = sweep_here
        self._configs: list[Any] = []
        """Those in which our name stands."""
        self._placed: PlacedExperts = layout.experts
        self._device = device
        placed = self._placed
        self._memory = device.tensor(arena)
        self._host_memory = device.tensor(host)
        experts = layout.blocks[placed.first :]
        self._places = {b.id: next(iter((b.device_image or b.image).places.values())) for b in experts}
        self._host_places = {b.id: next(iter(b.image.places.values())) for b in experts}
        routing = placed.routing
        ranks = policy(DEFAULT, routing)
        shelf = None
        if layout.back is not None and not placed.host_has_all:
            shelf = HostShelf(
                routing=routing,
                setting=CacheSetting(capacity=placed.host_capacity),
                policy=ranks,
                blocks=placed.blocks,
                slots=[[host.cut(nbytes) for _ in range(placed.host_capacity)] for nbytes in placed.host_slot_nbytes],
                let_go=executor.let_go,
            )
        count = placed.capacity + placed.passing
        self.pool = ExpertPool(
            routing=routing,
            setting=CacheSetting(capacity=placed.capacity),
            policy=ranks,
            blocks=placed.blocks,
            slots=[[arena.cut(nbytes) for _ in range(count)] for nbytes in placed.slot_nbytes],
            carrier=executor,
            expert_nbytes=placed.read_nbytes,
            apart=layout.back is not None,
            shelf=shelf,
        )
        self._split: Split | None = None
        self._shape: ExpertShape | None = None
        """Of an expert, once installed."""
        self._turn = threading.Lock()
        self._calls = threading.local()
        self._steps = 0
        self._tap: RouterTap | None = None
        self._ahead: LookAhead | None = None
        self._streams_others = layout.front.slots > 0
        self.places: tuple[int, ...] = ()
        """By layer of experts: the last block that is used before it, once installed. Members of a sweep meet there."""

    def statistics(self) -> PoolStatistics:
        """What the cache of experts did so far."""
        found = self.pool.statistics()
        return found if self._ahead is None else replace(found, prefetching=self._ahead.statistics())

    def outlook(self, costs: CostModel | None, *, exact: bool) -> ExpertForecast:
        """What a step is expected to miss, by made-up routing; seconds where the machine's costs are known."""
        assert self._shape is not None, "it is not installed"
        trace = expected_trace(self._placed.routing)
        return outlook_of(self._placed, self._shape, costs, trace, assumed=True, exact=exact)

    def look_ahead(self, costs: ExpertCosts, *, exact: bool = False) -> None:
        """Bring experts before their layer asks, where that gains time by these costs; beside a device apart also those
        that the CPU has computed.

        Not where other blocks are streamed, as drive and link are never idle then, nor where there is no room beside
        what passes.

        Args:
            costs: Of the machine.
            exact: Whether one processor computes everything.
        """
        moves = costs.copy_s if costs.separate else costs.read_s
        if costs.separate is not self._placed.apart or self._streams_others or self.pool.spare <= 0 or moves <= 0:
            return
        if costs.separate and exact:
            costs = replace(costs, cpu_s=lambda rows: NEVER_S)
        self._ahead = LookAhead(self.pool, LayerScheduler(costs), clock=time.monotonic)

    def share_with_cpu(self, costs: ExpertCosts) -> None:
        """Have the CPU compute experts from host memory, beside a device apart, where a layer is done sooner by these
        costs: results then equal those of one processor to rounding."""
        if costs.separate and self._split is None:
            self._split = Split()
            self.pool.share_with_cpu(LayerScheduler(costs))

    def install(self, module: nn.Module) -> None:
        """Have transformers call this for the layers whose experts are blocks."""
        register()
        self._shape = shape_of(module, self._placed.layers[0])
        self._tap = RouterTap(module, self._placed.layers, self._placed.routing.experts)
        self.places = self._blocks_before(module)
        for number, layer in enumerate(self._placed.layers):
            child: Any = module.get_submodule(layer.path)
            child.__dict__[_MARK] = (self, number)
            if not any(child.config is config for config in self._configs):
                take_over(child.config)
                self._configs.append(child.config)

    def _blocks_before(self, module: nn.Module) -> tuple[int, ...]:
        """By layer of experts: the highest block that is leased by then, in the order of definition."""
        last, found = 0, {}
        for path, _ in module.named_modules():
            last = max((last, *self._leases.get(path, ())))
            found[path] = last
        return tuple(found[layer.path] for layer in self._placed.layers)

    def begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A root call of this thread starts: what its layers will be part of."""
        self._steps += 1
        self._calls.step = step_of(self._steps - 1, args, kwargs)

    def forward(
        self, number: int, module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] What a layer's experts make of its tokens; arguments as transformers gives them."""
        if not len(hidden):
            return torch.zeros_like(hidden)
        sweep = self._sweep_here()
        asked = self._asked(number, hidden, chosen, weights)
        compute = partial(self._compute, module)
        return compute([asked])[0] if sweep is None else sweep.meet(number, asked, compute)

    def _asked(self, number: int, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> _Asked:
        """A call, with what the router said."""
        routing = self._placed.routing
        tokens = Grouped(hidden, chosen, weights, routing.experts)
        step: StepOf = getattr(self._calls, "step", None) or StepOf(number=self._steps, sequences=None)
        phase = step.phase(len(hidden), routing)
        near, scores = self._scores(number, chosen, weights)
        event = event_of(
            step=step.number,
            layer=number,
            phase=phase,
            experts=routing.experts,
            chosen=chosen.cpu().numpy(),
            candidates=near.cpu().numpy(),
            scores=scores.cpu().numpy(),
        )
        return _Asked(tokens=tokens, hidden=hidden, event=event)

    def _compute(self, module: nn.Module, asked: Sequence[_Asked]) -> list[torch.Tensor]:
        """[T, H] for each of some calls of one layer: an expert that several of them need is brought once."""
        event = asked[0].event if len(asked) == 1 else merged([each.event for each in asked])
        event = self._guessed(event, asked)
        tokens, together = [each.tokens for each in asked], len(asked) > 1
        with self._turn, self.pool.layer(event, shared=splittable(module)) as run:
            if self._ahead is not None:
                self._ahead.begun(event, run, together=together)
            lend = partial(self._weight, run)
            if self._split is not None and run.by_cpu:
                results = self._split.compute(tokens, module, run, lend, partial(self._host_weight, run))
            else:
                results = compute_together(tokens, module, run.order, lend)
            if self._ahead is not None:
                self._ahead.ended(event)
        return results

    def _guessed(self, event: Event, asked: Sequence[_Asked]) -> Event:
        """The event with what the router of the next layer says of these tokens, if somebody wants to know it."""
        routing, tap = self._placed.routing, self._tap
        if self._ahead is None or tap is None or event.phase != "decode" or event.layer + 1 == routing.layers:
            return event

        def ask() -> Ids | None:
            logits = tap.ask(event.layer + 1, torch.cat([each.hidden for each in asked]))
            if logits is None:
                return None
            return logits.topk(routing.top_k, dim=-1).indices.cpu().numpy().astype(np.uint16)

        guesses = self._ahead.guesses(event.layer, ask, together=len(asked) > 1)
        return event if guesses is None else with_guesses(event, guesses, routing.experts)

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
            yield _view(self._memory, residence.slot, self._places[lease.block])

    @contextmanager
    def _host_weight(self, run: LayerPass, part: int, expert: int) -> Iterator[torch.Tensor]:
        """The same in host memory, for the CPU."""
        with run.lent_by_host(part, expert) as lease:
            slot = lease.residence.slot
            slot.check_stamp(lease.block)
            yield _view(self._host_memory, slot, self._host_places[lease.block])

    def close(self) -> None:
        """Let go of the memory, and of the routers."""
        if self._tap is not None:
            self._tap.close()
        if self._split is not None:
            self._split.close()
        while self._configs:
            put_back(self._configs.pop())
        self._memory = self._host_memory = torch.empty(0)


def _view(memory: torch.Tensor, slot: Slot, place: Place) -> torch.Tensor:
    """The matrix of an expert that lies in a slot."""
    dtype = torch_dtype(place.dtype)
    return view_of(memory, slot.offset, place, dtype, contiguous_stride(place.shape))[0]


def register() -> None:
    """Let transformers know our function by its name."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls for a layer of experts: ours where the layer is streamed by expert, else its own.

    Where gradients pass through, weights would have to stay until backward: the whole layer is gathered, beyond the
    budget.
    """
    around = module.__dict__.get(AROUND)
    if around is not None:
        with around(top_k_index):
            trained: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return trained
    found = module.__dict__.get(_MARK)
    passes = torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or top_k_weights.requires_grad
        or any(parameter.requires_grad for parameter in module.parameters())  # which may be all that is trained
    )
    if found is None or passes:
        whole: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return whole
    runner, number = found
    result: torch.Tensor = runner.forward(number, module, hidden_states, top_k_index, top_k_weights)
    return result
