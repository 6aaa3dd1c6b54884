"""What a model would do on a machine, from its config alone: where it would lie, and how fast it would run.

The model is built without weights and rehearsed without memory; blocks are cut and placed by the planner that `load`
uses, and the run is simulated with the executor's own decisions at the machine's rates.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from transformers import PreTrainedModel

from ..memory.errors import DoesNotFitError, UsageError
from ..scheduler.alternation import Split
from ..scheduler.cost import CostModel
from ..scheduler.experts.forecast import ExpertForecast, expected_trace
from ..scheduler.experts.shape import Routing
from ..scheduler.experts.trace import Trace
from ..scheduler.hardware import Hardware
from ..scheduler.operations import Operation
from ..scheduler.plan import Links, Plan
from ..scheduler.program import Program
from ..scheduler.setting import Setting
from ..scheduler.simulator import Prediction, simulate
from ..scheduler.sizes import Workload
from .backing import CheckpointBacking
from .deciding import Decisions, alternation_of, told
from .experts.layers import find_expert_layers, shape_of
from .experts.outlook import outlook_of
from .feeding import with_context
from .headroom import headroom_nbytes, kv_nbytes
from .imaginedfile import imagined_file
from .layout import Budgets, Layout
from .planned import make_plan
from .planning import Planner
from .pretrained import outline
from .programs import programs
from .rehearsal import make_fake
from .simulation import setting_of
from .units import Units, find_units, settled

SYSTEM_NBYTES: Final = 2 * 2**30
"""What the system and other programs keep of a host's memory."""
DECODED: Final = 8
"""Tokens that are simulated at most; while the first few run, the order is still being learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Memory that a model may take, in bytes; None is all that the machine has left."""

    host: int | None = None
    device: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run would take."""

    hardware: Hardware
    plan: Plan
    setting: Setting
    prediction: Prediction
    prompt: int
    generated: int
    """Tokens of each answer."""
    batch: int
    warm: bool
    """Whether the model has answered before."""
    headroom_nbytes: int
    """Left for keys and values, activations and logits on the tier that computes."""
    busy_s: Mapping[str, float]
    """By resource: what a token takes of it, of all sequences. The longest one binds."""
    lanes: int = 1
    """Micro-batches that the batch is cut into, which share each sweep over the weights."""
    experts: ExpertForecast | None = None
    """Where experts are blocks of their own: what routers will ask for and is not there."""
    cpu_share: float = 0.0
    """Of several: the part of the blocks that the CPU can compute which it does compute, while the others go on."""

    @property
    def first_token_s(self) -> float:
        """From the moment that the model is known: what stays is read with the prompt."""
        first = self.prediction.turns[0]
        waiting = self.experts.prompt_waiting_s if self.experts is not None else 0.0
        return waiting + (first.seconds if self.warm else first.end_ns / 1e9)

    @property
    def token_s(self) -> float:
        """Of every token after that, or of a call for a model that does not generate."""
        turns = self.prediction.turns
        waiting = self.experts.waiting_s if self.experts is not None else 0.0
        return waiting + self.prediction.seconds(turns[-1].title)

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, over the whole answer."""
        return self.batch * self.generated / self.answer_s

    @property
    def answer_s(self) -> float:
        """Prompt and answer."""
        return self.first_token_s + (self.generated - 1) * self.token_s

    @property
    def seconds(self) -> float:
        """Of all that is asked for: what advice is to make shorter."""
        return self.answer_s

    @property
    def moves(self) -> bool:
        """Whether anything is moved, so that another machine could do it faster."""
        return not self.plan.resident

    @property
    def binds(self) -> str:
        """What a token is bound by."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])


class Foresight:
    """One model, to be foreseen on any number of machines.

    Args:
        path: A folder or a Hub id; only config.json is looked at.

    Raises:
        CheckpointError: the config cannot be found, or used.
        UsageError: the dtype has no meaning.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
    ) -> None:
        self.name = os.fspath(path)
        self.model: PreTrainedModel = outline(path, dtype=dtype, trust_remote_code=trust_remote_code)
        self._rehearsed: PreTrainedModel = outline(path, dtype=dtype, trust_remote_code=trust_remote_code)
        make_fake(self._rehearsed)
        self._programs: dict[tuple[int, int, int], tuple[Program, ...]] = {}
        self._traces: dict[tuple[int, int], Trace] = {}
        """Made-up routing, by batch and prompt."""

    def _expected(self, routing: Routing, batch: int, prompt: int) -> Trace:
        key = batch, prompt
        if key not in self._traces:
            self._traces[key] = expected_trace(routing, batch=batch, prompt=prompt)
        return self._traces[key]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each parameter, tied ones once."""
        return {name: parameter.nbytes for name, parameter in self.model.named_parameters()}

    @property
    def weights_nbytes(self) -> int:
        """Of all parameters, tied ones once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @cached_property
    def backing(self) -> CheckpointBacking:
        """As if the checkpoint were one file, which need not be there."""
        file = imagined_file(self.model, os.path.join(self.name, "model.safetensors"))
        sources = {name: file[name] for name, _ in self.model.named_parameters()}
        dtypes = {name: source.dtype for name, source in sources.items()}
        return CheckpointBacking(sources, dtypes, {name: source.shape for name, source in sources.items()})

    def programs(self, workload: Workload, prompt: int) -> tuple[Program, ...]:
        """The calls of an answer; see `programs.programs`."""
        key = workload.batch, workload.context, prompt
        if key not in self._programs:
            self._programs[key] = programs(self._rehearsed, workload, prompt=prompt)
        return self._programs[key]

    def forecast(
        self,
        hardware: Hardware,
        *,
        prompt: int,
        generated: int,
        batch: int = 1,
        room: Room | None = None,
        threads: int = 0,
        exact: bool = False,
        warm: bool = False,
        lanes: int = 1,
        trace: Trace | None = None,
    ) -> Forecast:
        """Plan and simulate `batch` answers of `generated` tokens to prompts of `prompt` tokens.

        Experts that are blocks of their own are foreseen by a `trace` of the model's routing, or of made-up routing
        without one. What their layers wait for is added to what all else takes.

        `warm` is a model that has answered before: what stays is there when the prompt comes. The batch is cut into
        `lanes` micro-batches of like size, which alternate between the processors where that pays.

        Raises:
            DoesNotFitError: some tier is too small to run at all; the message says how much it needs.
            UnknownInputError: what the model reads is not known.
        """
        if not hardware.drives:
            raise UsageError(
                f"{hardware.name}: no drive is known, which weights are read from: give it one under drives"
            )
        rows = -(-batch // lanes)
        workload = with_context(self.model, Workload(batch=rows, context=prompt + generated))
        headroom = headroom_nbytes(self.model.config, self.model.dtype, context=workload.context, batch=batch)
        budgets = self.budgets(hardware, room or Room(), headroom)
        cost = CostModel(hardware=hardware, threads=threads)
        decisions = Decisions(costs=cost, rows=rows, exact=exact, lanes=lanes) if hardware.gpu is not None else None
        beside = kv_nbytes(self.model.config, self.model.dtype, context=workload.context, batch=batch)
        layout, units, stays = self._layout(hardware, budgets, decisions, beside)
        cost = replace(cost, beside=hardware.gpu is None and cost.crowded and not layout.resident)  # see resting.py
        calls = self.programs(workload, prompt)
        setting = setting_of(layout, units)
        links = Links(disk_read=budgets.disk_rate, h2d=budgets.link_rate if hardware.link else None)
        experts = self._experts(layout, cost, trace, batch=batch, prompt=prompt, exact=exact)
        plan = make_plan(
            layout,
            device_name(hardware),
            budgets,
            links,
            self.weights_nbytes,
            stays,
            experts=experts,
            experts_shared=decisions is not None and not exact and layout.experts is not None and layout.experts.apart,
        )
        split = Split(cpu_share=0.0, seconds=0.0)
        if lanes > 1 and units.on_cpu:
            most = min(max(budgets.host - layout.host_nbytes, 0) / max(beside, 1), 1.0)
            split = alternation_of(self.model, layout, units, plan, cost).best(rows=rows, lanes=lanes, most_keys=most)
            plan = replace(plan, notes=(*plan.notes, told(split, rows=rows, lanes=lanes)))
        part = units.part(split.cpu_share, {block.id: block.image.data_nbytes for block in layout.blocks})
        answer = (*calls[:-1], *[calls[-1]] * DECODED)
        prediction = simulate(setting, answer, cost, started=warm, until_steady=True, lanes=lanes, part=part)
        dtype = str(self.model.dtype).removeprefix("torch.")
        here = units.on_cpu.keys() if lanes == 1 else part
        return Forecast(
            hardware=hardware,
            plan=plan,
            setting=setting,
            prediction=prediction,
            prompt=prompt,
            generated=generated if len(calls) > 1 else 1,
            batch=lanes * rows,
            warm=warm,
            headroom_nbytes=headroom,
            experts=experts,
            busy_s=_busy(layout, calls[-1], cost, rows, dtype, lanes=lanes, here=here, experts=experts),
            lanes=lanes,
            cpu_share=split.cpu_share,
        )

    def _experts(
        self, layout: Layout, cost: CostModel, trace: Trace | None, *, batch: int, prompt: int, exact: bool
    ) -> ExpertForecast | None:
        """What routers will ask for and is not there, where experts are blocks of their own.

        Raises:
            UsageError: there is a trace of the routing of experts, and the model has none.
        """
        if layout.experts is not None:
            shape = shape_of(self.model, layout.experts.layers[0])
            routed = trace or self._expected(layout.experts.routing, batch, prompt)
            return outlook_of(layout.experts, shape, cost, routed, assumed=trace is None, batch=batch, exact=exact)
        if trace is not None and find_expert_layers(self.model, self.sizes) is None:
            raise UsageError(f"{self.name} has no experts whose routing a trace could foretell: leave it out")
        return None

    def _layout(
        self, hardware: Hardware, budgets: Budgets, decisions: Decisions | None, beside_nbytes: int
    ) -> tuple[Layout, Units, tuple[str, ...]]:
        """Where blocks lie, what the CPU can compute of them, and notes on what it cannot.

        Args:
            beside_nbytes: Host memory for keys and values, if it does.
        """
        layout = Planner(
            self.model,
            self.backing,
            budgets,
            buffers_nbytes=sum(buffer.nbytes for buffer in self.model.buffers()),
            keep_skew=hardware.gpu is None or hardware.emulated,
            work=None if decisions is None else decisions.of(self.model),
            beside_nbytes=beside_nbytes,
            experts=True,
        ).best()
        if decisions is None:
            return layout, Units(), ()
        computes = torch.device("cpu" if hardware.emulated else "cuda")
        room = budgets.host - beside_nbytes
        layout, stays = settled(self.model, layout, computes, decisions.processors, host_nbytes=room)
        return layout, find_units(self.model, layout, computes), stays

    def budgets(self, hardware: Hardware, room: Room, headroom: int) -> Budgets:
        """Bytes of each tier for weights: as asked for, or what the machine has beside a run's `headroom`.

        Raises:
            DoesNotFitError: that leaves nothing, or the run no room.
            UsageError: a tier is asked for that the machine has not got, or more of it.
        """
        separate = hardware.gpu is not None
        host, device = room.host, room.device
        if device is not None and not separate:
            raise UsageError(f"{hardware.name} has no GPU: leave the device budget out, host is the one that counts")
        if host is not None and host > hardware.host_nbytes:
            raise UsageError(
                f"{hardware.name} has {hardware.host_nbytes} bytes of host memory: a budget of {host} bytes is more "
                f"than there is. Name a machine that has it"
            )
        if host is None:
            host = hardware.host_nbytes - SYSTEM_NBYTES - (0 if separate else headroom)
        if separate and device is None:
            assert hardware.gpu is not None
            device = hardware.gpu.memory_nbytes - headroom
        has = hardware.gpu.memory_nbytes if hardware.gpu is not None else hardware.host_nbytes
        computes, asked = ("device", device) if separate else ("host", host)
        if asked is not None and asked + headroom > has:
            raise DoesNotFitError(
                f"{hardware.name}: a {computes} budget of {asked} bytes leaves no room for what the run itself takes "
                f"({headroom} bytes for keys and values, activations, logits) in {has} bytes: lower it, or batch or "
                f"context",
                tier=computes,
                needed_nbytes=asked + headroom,
                available_nbytes=has,
            )
        for tier, nbytes in (("host", host), ("device", device)):
            if nbytes is not None and nbytes <= 0:
                raise DoesNotFitError(
                    f"{hardware.name}: the run itself takes {headroom} bytes besides weights (keys and values, "
                    f"activations, logits), more than its {tier} memory holds: lower batch or context",
                    tier=tier,
                    needed_nbytes=headroom,
                    available_nbytes=has,
                )
        link = hardware.link.h2d.best if hardware.link else None
        return Budgets(
            host=host,
            device=device if separate else None,
            disk_rate=hardware.disk_read or 1.0,
            link_rate=link or 2e10,
        )


def device_name(hardware: Hardware) -> str:
    """What a plan calls what computes on a machine."""
    if hardware.gpu is None:
        return "cpu"
    return "emulated" if hardware.emulated else hardware.gpu.name


def _busy(
    layout: Layout,
    call: Program,
    cost: CostModel,
    rows: int,
    dtype: str,
    *,
    lanes: int,
    here: Collection[int],
    experts: ExpertForecast | None,
) -> dict[str, float]:
    """What a call takes of each resource, if so many lanes make it, and the CPU computes `here` for all."""
    fixed = [block for block in layout.on_disk() if not layout.is_expert(block)]
    where = "GPU" if cost.hardware.gpu is not None else "CPU"
    found = {where: lanes * cost.compute_s(call.operations(), "gpu")}
    on_cpu = [b for b in layout.streamed() if b.id in here and layout.on_cpu.get(b.id, 0) > rows]
    if on_cpu:
        products = [
            Operation(kind="linear", nbytes=layout.per_token(b) * b.image.data_nbytes, rows=rows, dtype=dtype)
            for b in on_cpu
        ]
        found["CPU"] = lanes * cost.compute_s(products, "cpu")
        found[where] = max(found[where] - lanes * cost.compute_s(products, "gpu"), 0.0)
    disk = sum(layout.per_token(block) * block.image.read_nbytes for block in fixed)
    disk += 0.0 if experts is None else experts.read_nbytes
    if disk:
        found["disk"] = cost.read_s(disk, 4 * 2**20)
    if layout.back is not None:
        copied = [b for b in layout.streamed() if b not in on_cpu and not layout.is_expert(b)]
        link = sum(layout.per_token(block) * block.image.data_nbytes for block in copied)
        link += 0.0 if experts is None else experts.copied_nbytes
        if link:
            found["host-to-device link"] = cost.copy_s(link, 4 * 2**20)
    return found
