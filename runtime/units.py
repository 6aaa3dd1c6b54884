"""Which parts of a model the CPU may compute from host memory, and why others may not.

A unit is a module that can be computed elsewhere as a whole: all its weights are there, nobody else uses them, and what
it keeps between calls can be moved. The largest such modules are units: a decoder layer rather than its matrices, so
that activations cross once, and attention is computed where its keys and values lie.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn

from ..memory.image import ALIGN
from ..memory.layout import ITEMSIZE
from ..scheduler.alternation import spread
from .layout import Draft, Layout
from .partition import callable_module

_ATTENTIONS: Final = frozenset({"", "eager", "sdpa"})
"""Implementations of attention that the CPU has."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A module that the CPU computes when it is called with few rows."""

    path: str
    """Of the module: nothing that a model's end waits for may keep the module itself."""
    blocks: tuple[int, ...]
    """Those that hold its weights, without block 0."""
    rows_below: int
    """Calls of fewer rows are computed on the CPU."""
    small: tuple[nn.Parameter, ...]
    """Its weights among the small tensors, which stay on the device: the host needs copies."""
    layers: frozenset[int]
    """Indices of its entries in a cache of keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """A unit, or a piece of a table, as far as its share of the work is concerned."""

    blocks: tuple[int, ...]
    rows_below: int
    layers: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Units:
    """What of a layout the CPU may compute."""

    units: tuple[Unit, ...] = ()
    pieces: Mapping[int, int] = field(default_factory=dict)
    """Of tables: by block, the rows below which a product with it is computed on the CPU."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """By block: why it is computed on the device all the same."""

    @property
    def on_cpu(self) -> dict[int, int]:
        """By block, the rows below which it is computed on the CPU."""
        found = dict(self.pieces)
        for unit in self.units:
            found.update(dict.fromkeys(unit.blocks, unit.rows_below))
        return found

    def in_order(self) -> list[Portion]:
        """All that the CPU can compute, in the order of definition."""
        found = [Portion(blocks=u.blocks, rows_below=u.rows_below, layers=u.layers) for u in self.units]
        found += [Portion(blocks=(block,), rows_below=rows) for block, rows in self.pieces.items()]
        return sorted(found, key=lambda portion: portion.blocks)

    def part(self, share: float, nbytes: Mapping[int, int]) -> frozenset[int]:
        """A share of the blocks that the CPU can compute, by bytes, in whole units that are spread evenly.

        Args:
            share: 0 to 1.
            nbytes: Of each block.
        """
        portions = self.in_order()
        chosen = spread([sum(nbytes[block] for block in portion.blocks) for portion in portions], share)
        return frozenset(block for place in chosen for block in portions[place].blocks)

    @property
    def small_nbytes(self) -> int:
        """Host memory that copies of small tensors take."""
        small = {id(parameter): parameter for unit in self.units for parameter in unit.small}
        return sum(parameter.nbytes for parameter in small.values())


def find_units(module: nn.Module, layout: Layout, device: torch.device) -> Units:
    """The units that `layout.on_cpu` asks for, as far as they can be; `device` computes the rest."""
    if not layout.on_cpu or layout.back is None:
        return Units(refused=dict.fromkeys(layout.on_cpu, "device and host are one tier"))
    finder = _Finder(module, layout, device)
    finder.visit(module, "")
    found = Units(units=tuple(finder.units), pieces=finder.pieces())
    there = found.on_cpu
    reasons = {b: finder.reasons.get(b, "no module has all of it to itself") for b in layout.on_cpu if b not in there}
    return replace(found, refused=reasons)


Processors = Callable[[nn.Module, Layout], Mapping[int, int]]
"""Chooses, for blocks of a layout, below how many rows each is computed on the CPU."""


def settled(
    module: nn.Module,
    layout: Layout,
    device: torch.device,
    processors: Processors | None = None,
    *,
    host_nbytes: int | None = None,
) -> tuple[Layout, tuple[str, ...]]:
    """The layout with the blocks that the CPU can in fact compute, and notes on those that it cannot.

    Args:
        module: The model.
        layout: What `on_cpu` asks for is taken from `processors` where they are given.
        device: That computes the rest.
        processors: Chooses.
        host_nbytes: Host memory for all of it, copies of small tensors included. Where these do not fit, the device
            computes; None is as much as it takes.
    """
    if processors is not None and layout.back is not None:
        layout = replace(layout, on_cpu=processors(module, layout))
    if not layout.on_cpu:
        return layout, ()
    found = find_units(module, layout, device)
    notes = tuple(
        f"{count} blocks are computed on the device, not on the CPU: {reason}"
        for reason, count in Counter(found.refused.values()).items()
    )
    own = layout.own_host_nbytes + found.small_nbytes
    if host_nbytes is not None and found.on_cpu and layout.host_nbytes + found.small_nbytes > host_nbytes:
        missing = layout.host_nbytes + found.small_nbytes - host_nbytes
        note = (
            f"{len(found.on_cpu)} blocks are computed on the device, not on the CPU: their keys and values, and copies "
            f"of small tensors, take {missing} bytes more of the host than its budget has"
        )
        return replace(layout, on_cpu={}), (*notes, note)
    return replace(layout, on_cpu=found.on_cpu, own_host_nbytes=own), notes


class _Finder:
    """One search through a model."""

    def __init__(self, module: nn.Module, layout: Layout, device: torch.device) -> None:
        assert layout.back is not None
        self.layout = layout
        self.device = device
        self.units: list[Unit] = []
        self.reasons: dict[int, str] = {}
        by_name = dict(module.named_parameters())
        self.tables = {id(by_name[name]) for name in layout.tables}
        self.home: dict[int, int] = {}
        self.usable: dict[int, int] = {}
        """By block, the rows asked for, of those whose place in the host a kernel can read."""
        self.held: dict[int, set[int]] = defaultdict(set)
        """By block, the parameters in it."""
        for block in layout.blocks:
            for portion in block.portions:
                self.home.setdefault(id(by_name[portion.name]), block.id)
                self.held[block.id].add(id(by_name[portion.name]))
            if block.id in layout.on_cpu:
                reason = self._unusable(block, layout.back.resident)
                if reason is None:
                    self.usable[block.id] = layout.on_cpu[block.id]
                else:
                    self.reasons[block.id] = reason
        self.owners: dict[int, list[str]] = defaultdict(list)
        for path, child in module.named_modules(remove_duplicate=False):
            for parameter in child._parameters.values():
                if parameter is not None:
                    self.owners[id(parameter)].append(path)
        self.shares_keys = any(_uses_others_keys(child) for child in module.modules())
        self.lessors: dict[int, list[str]] = defaultdict(list)
        """By block, the modules that lease it."""
        for path, held in layout.leases.items():
            for number in held:
                self.lessors[number].append(path)

    def _unusable(self, block: Draft, resident: Iterable[int]) -> str | None:
        if block.id not in resident or self.layout.on_cpu[block.id] <= 0:
            return "they do not stay in host memory"
        assert block.device_image is not None
        for key, place in block.image.places.items():
            if place.offset % ITEMSIZE[place.dtype]:
                return "their bytes are not aligned in the file"
            same = (place.offset - block.device_image.places[key].offset) % ALIGN == 0
            if not same and place.nbytes and self.device.type == "cpu":
                return "kernels would find them aligned otherwise than on the device"
        return None

    def visit(self, module: nn.Module, path: str) -> None:
        """Take the module as a unit, or look at its parts."""
        held = {self.home.get(id(parameter), -1) for parameter in module.parameters()}
        if not held & self.usable.keys():
            return
        if path and callable_module(module):
            reason = self._refusal(module, path, held)
            if reason is None:
                self.units.append(self._unit(module, path, held))
                return
            for block in held & self.usable.keys():
                if path in self.lessors[block]:  # no part of it can have the block to itself
                    self.reasons[block] = reason
        for name, child in module.named_children():
            self.visit(child, f"{path}.{name}" if path else name)

    def _refusal(self, module: nn.Module, path: str, held: set[int]) -> str | None:
        """Why a module is no unit; None if it is one."""
        parameters = {id(parameter) for parameter in module.parameters()}
        blocks = held - {0}
        if -1 in held or parameters & self.tables or not blocks <= self.usable.keys():
            return "other weights of the same module are not in host memory"
        if any(not self.held[block] <= parameters for block in blocks):
            return "they share a block with weights of other modules"
        users = {owner for key in parameters for owner in self.owners[key]}
        users.update(lessor for block in blocks for lessor in self.lessors[block])
        if any(user != path and not user.startswith(f"{path}.") for user in users):
            return "several modules use the same weights"
        if self.shares_keys and _layer_indices(module):
            return "layers use keys and values of other layers"
        if len(_layer_indices(module)) > 1 or any(_is_stack(child) for child in module.modules()):
            return "they belong to several layers"
        return _unmovable(module, self.device)

    def _unit(self, module: nn.Module, path: str, held: set[int]) -> Unit:
        blocks = tuple(sorted(held - {0}))
        return Unit(
            path=path,
            blocks=blocks,
            rows_below=min(self.usable[block] for block in blocks),
            small=tuple(p for p in module.parameters() if self.home[id(p)] == 0),
            layers=frozenset(_layer_indices(module)),
        )

    def pieces(self) -> dict[int, int]:
        """Pieces of tables, each computed for itself."""
        wanted = {block for blocks in self.layout.tables.values() for block in blocks}
        return {block: rows for block, rows in self.usable.items() if block in wanted}


def _layer_indices(module: nn.Module) -> set[int]:
    found = {getattr(child, "layer_idx", None) for child in module.modules()}
    return {index for index in found if isinstance(index, int)}


def _uses_others_keys(module: nn.Module) -> bool:
    """Whether attention looks for its keys and values in the cache's entry of another layer."""
    return any("kv_shared" in name and value not in (None, False) for name, value in vars(module).items())


def _is_stack(module: nn.Module) -> bool:
    """Whether it is a list of layers: the rows of whatever holds it need not be those of its layers."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    kinds = [type(layer) for layer in module if any(True for _ in layer.children())]
    return len(kinds) > len(set(kinds))


def _unmovable(module: nn.Module, device: torch.device) -> str | None:
    """What of a module's own keeps it on the device; None if nothing does."""
    for child in module.modules():
        values: dict[str, Any] = vars(child)
        implementation = getattr(values.get("config"), "_attn_implementation", None) or ""
        if hasattr(child, "layer_idx") and implementation not in _ATTENTIONS:
            return f"attention is computed by {implementation}, which the CPU does not have"
        if device.type != "cpu" and any(_on(value, device) for value in values.values()):
            return "they keep tensors on the device besides their weights"
    return None


def _on(value: object, device: torch.device) -> bool:
    return isinstance(value, torch.Tensor) and value.device == device
