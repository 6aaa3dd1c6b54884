"""Which modules of a model hold experts as transformers 5 does: fused, and called through its interface of experts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from ...scheduler.experts.shape import MOST_EXPERTS, ExpertShape, Routing
from .implementation import IMPLEMENTATION, REPLACED

logger = logging.getLogger(__name__)

_TOP_K: Final = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "num_experts_per_token", "moe_topk", "top_k")
"""Names that configs and routers give to the number of experts of a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayer:
    """One module that holds the experts of a layer."""

    path: str
    parts: tuple[str, str]
    """Names of the parameters [experts, …] of the first product (gate and up, or up alone) and of the second (down)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayers:
    """All of a model, alike."""

    routing: Routing
    layers: tuple[ExpertLayer, ...]
    """In the order in which they are defined, which is that in which they run."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters that experts are cut from."""
        return frozenset(name for layer in self.layers for name in layer.parts)


def find_expert_layers(
    module: nn.Module, sizes: Mapping[str, int], *, any_implementation: bool = False
) -> ExpertLayers | None:
    """The expert layers of a model, or None: it has none, or none that can be cut.

    Those can be cut that transformers computes with `grouped_mm`, whose experts are all of one size, and of which it is
    known how many a token uses.

    Args:
        module: The model.
        sizes: Bytes of each parameter that is streamed, by its first qualified name.
        any_implementation: Those too that transformers computes otherwise: they cannot be cut, but recorded.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners = Counter(id(p) for child in module.modules() for p in child._parameters.values() if p is not None)
    layers, kinds = [], set()
    modules = dict(module.named_modules())
    for path, child in modules.items():
        parts = _parts(child, any_implementation)
        if parts is None:
            continue
        top_k = _top_k(child, modules[path.rpartition(".")[0]])
        if top_k is None or any(names[id(part)] not in sizes or owners[id(part)] > 1 for part in parts):
            logger.info("the experts of %s are streamed together: how they are used is not known", path)
            return None
        first, second = parts
        kinds.add((len(first), top_k, first.shape[1:], second.shape[1:], first.dtype, second.dtype))
        layers.append(ExpertLayer(path=path, parts=(names[id(first)], names[id(second)])))
    if len(kinds) != 1:
        if kinds:
            logger.info("experts are streamed layer by layer: this model has %d kinds of them", len(kinds))
        return None
    ((experts, top_k, *_),) = kinds
    routing = Routing(layers=len(layers), experts=experts, top_k=top_k)
    return ExpertLayers(routing=routing, layers=tuple(layers))


def fused_experts(module: nn.Module) -> dict[str, int]:
    """How many experts lie in each parameter that holds those of a layer, by its first qualified name.

    It tells them by the class of the module, however they are computed.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = (_parts(child, True) for child in module.modules())
    return {names[id(part)]: len(part) for parts in found if parts is not None for part in parts}


def fused_parts(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter] | None:
    """The parameters that hold the experts of a module, which transformers computes with `grouped_mm`; else None."""
    return _parts(module, False)


def shape_of(model: nn.Module, layer: ExpertLayer) -> ExpertShape:
    """Sizes of an expert of a layer."""
    module: Any = model.get_submodule(layer.path)
    down = module.down_proj
    hidden, ffn = (down.shape[2], down.shape[1]) if module.is_transposed else (down.shape[1], down.shape[2])
    return ExpertShape(hidden=hidden, ffn=ffn, gated=module.has_gate, dtype=str(down.dtype).removeprefix("torch."))


def _parts(module: nn.Module, any_implementation: bool) -> tuple[nn.Parameter, nn.Parameter] | None:
    """The parameters of a module of a class that transformers' decorator of experts knows."""
    marks = module.__dict__
    if not all(name in marks for name in ("config", "has_gate", "has_bias", "is_transposed")):
        return None
    # Ours is there where another model of the same config streams.
    said = getattr(marks["config"], "_experts_implementation", None)
    if not any_implementation and said not in (REPLACED, IMPLEMENTATION):
        return None
    first = module._parameters.get("gate_up_proj" if marks["has_gate"] else "up_proj")
    second = module._parameters.get("down_proj")
    if first is None or second is None or first.dim() != 3 or second.dim() != 3 or len(first) != len(second):
        return None
    if not 1 < len(first) <= MOST_EXPERTS or getattr(module, "num_experts", None) != len(first):
        return None
    return first, second


def _top_k(experts: Any, parent: nn.Module) -> int | None:
    """Experts of a token: as the config says, or the module around them, or the router beside them."""
    for holder in (experts.config, parent, *parent.children()):
        for name in _TOP_K:
            value = getattr(holder, name, None)
            if isinstance(value, int) and 1 <= value <= experts.num_experts:
                return value
    return None
