"""What a calibration decides when a model is loaded: where blocks live, and which processor computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from ..scheduler.alternation import Alternation, Part, Split
from ..scheduler.cost import CostModel
from ..scheduler.operations import Operation
from ..scheduler.plan import Plan
from ..scheduler.processors import GAIN, Candidate, Traffic, choose, cpu_s, device_s
from .layout import Draft, Layout
from .placing import CROSSINGS, REQUEST, TokenWork, layers_of
from .units import Units


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """For models on a calibrated machine.

    Args:
        costs: Of the machine.
        rows: Sequences at a time while they are continued.
        exact: Whether only one processor may compute.
        lanes: Micro-batches of so many sequences that will share each sweep.
    """

    costs: CostModel
    rows: int
    exact: bool
    lanes: int = 1

    def of(self, model: nn.Module) -> TokenWork:
        """What a token of a model costs."""
        return TokenWork(costs=self.costs, rows=self.rows, dtype=_main_dtype(model), exact=self.exact, lanes=self.lanes)

    def processors(self, model: nn.Module, layout: Layout) -> Mapping[int, int]:
        """For blocks that stay on the host: below how many rows the CPU computes them."""
        if self.exact:
            return {}
        return choose(_candidates(layout, self.of(model)), self.costs, traffic=_traffic(layout))

    def exact_cost_s(self, model: nn.Module, layout: Layout) -> float | None:
        """Seconds per token that one processor costs more than two; None where there is nothing to choose."""
        traffic, saved = _traffic(layout), 0.0
        for each in _candidates(layout, self.of(model)):
            if not self.exact and each.block not in layout.on_cpu:
                continue  # the CPU cannot compute it anyway
            on_device = device_s(each, self.costs, self.rows, traffic)
            saved += max(on_device - cpu_s(each, self.costs, self.rows, traffic), 0.0)
        return saved or None

    def with_lanes(self, plan: Plan, model: nn.Module, layout: Layout, units: Units, *, most_keys: float) -> Plan:
        """A plan that says how micro-batches of so many sequences will share its sweeps.

        Args:
            units: What the CPU can in fact compute.
            most_keys: The part of their keys and values that host memory has room for.
        """
        alternation = alternation_of(model, layout, units, plan, self.costs)
        split = alternation.best(rows=self.rows, lanes=self.lanes, most_keys=most_keys)
        return replace(plan, notes=(*plan.notes, told(split, rows=self.rows, lanes=self.lanes)))


def alternation_of(model: nn.Module, layout: Layout, units: Units, plan: Plan, costs: CostModel) -> Alternation:
    """What sweeps of several micro-batches take, with one processor and with two.

    Args:
        units: What the CPU can in fact compute.
        plan: Of the layout.
    """
    dtype = _main_dtype(model)
    drafts = {block.id: block for block in layout.blocks if layout.per_token(block) and block.id}
    on_cpu = units.on_cpu
    copied = [block for block in layout.streamed() if block.id not in on_cpu]
    layers = {index for child in model.modules() if isinstance(index := getattr(child, "layer_idx", None), int)}
    parts = [
        Part(
            blocks=tuple(_candidate(drafts[block], dtype) for block in portion.blocks if block in drafts),
            rows_below=portion.rows_below,
            keys=len(portion.layers & layers) / max(len(layers), 1),
        )
        for portion in units.in_order()
    ]
    return Alternation(
        costs,
        able=parts,
        others=[_candidate(block, dtype) for block in drafts.values() if block.id not in on_cpu],
        copied_nbytes=sum(layout.per_token(block) * block.image.data_nbytes for block in copied),
        copied=frozenset(block.id for block in copied if layout.per_token(block) >= 1),
        disk_s=plan.terms.get("disk", 0.0),
        link_rate=plan.links.h2d,
    )


def told(split: Split, *, rows: int, lanes: int) -> str:
    """What was chosen for so many micro-batches, in words."""
    batches = f"{lanes} micro-batches of {rows}"
    if not split.cpu_share:
        return f"{batches} share each sweep, on one processor: two would not be {GAIN:.0%} faster"
    return (
        f"{batches} alternate between the processors: the CPU computes {split.cpu_share:.0%} of what it can, while the "
        f"device goes on; about {split.seconds:.3g} s per sweep"
    )


def _main_dtype(model: nn.Module) -> str:
    """That most of a model's weights have."""
    dtypes = Counter[torch.dtype]()
    for parameter in model.parameters():
        dtypes[parameter.dtype] += parameter.numel()
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.")


def _traffic(layout: Layout) -> Traffic:
    return Traffic(copying=bool(layout.streamed()), reading=bool(layout.on_disk()))


def _candidates(layout: Layout, work: TokenWork) -> Iterator[Candidate]:
    if layout.back is None:
        return
    blocks = [block for block in layout.blocks if not layout.is_expert(block)]  # their layer decides, when it runs
    layers = layers_of(blocks)
    there = {b.id for b in blocks if b.id in layout.back.resident and b.id not in layout.front.resident}
    whole = Counter(layers[block] for block in there if block in layers)
    for layer, count in Counter(layers.values()).items():
        if whole[layer] < count:
            whole[layer] = 1  # what is left of it goes to the CPU and back for each block
    for block in blocks:
        if block.id in there:
            yield _candidate(block, work.dtype, together=whole[layers[block.id]] if block.id in layers else 1)


def _candidate(block: Draft, dtype: str, *, together: int = 1) -> Candidate:
    nbytes = block.image.data_nbytes
    return Candidate(
        block=block.id,
        operations=(Operation(kind="linear", nbytes=nbytes, dtype=dtype),),
        nbytes=nbytes,
        request_nbytes=min(REQUEST, nbytes),
        row_nbytes=_row_nbytes(block),
        crossings=CROSSINGS / together,
    )


def _row_nbytes(block: Draft) -> float:
    """Bytes of activations that go in, or come out, for each row: as wide as the widest side of its largest matrix."""
    largest = max(block.image.places.values(), key=lambda place: place.nbytes)
    return max(largest.shape, default=1) * largest.nbytes / max(prod(largest.shape), 1)
