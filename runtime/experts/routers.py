"""What routers say beyond what they decide: the logits of all experts, and what a later layer would choose."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layers import ExpertLayer

_NAMES: Final = ("gate", "router")
"""Names of routers in transformers' models, which are looked at before other neighbours of the experts."""


class RouterTap:
    """Notes the logits of each router that runs, by thread, until they are asked for.

    Args:
        module: The model.
        layers: Whose routers.
        experts: Of a layer.
    """

    def __init__(self, module: nn.Module, layers: Sequence[ExpertLayer], experts: int) -> None:
        self._experts = experts
        self._routers = [_router_of(module, layer, experts) for layer in layers]
        self._widths = [None if router is None else _width_asked(router, experts) for router in self._routers]
        """Of what each can be asked about by itself; None where it takes more than that."""
        self._said = threading.local()
        self._hooks: list[RemovableHandle] = []
        for number, router in enumerate(self._routers):
            if router is not None:
                self._hooks.append(router.register_forward_hook(self._note(number)))

    @property
    def complete(self) -> bool:
        """Whether every layer has a router that is known."""
        return all(router is not None for router in self._routers)

    def _note(self, layer: int) -> Any:
        def hook(router: nn.Module, args: Any, output: Any) -> None:
            self._by_layer()[layer] = _logits_in(output, self._experts)

        return hook

    def _by_layer(self) -> dict[int, torch.Tensor | None]:
        found: dict[int, torch.Tensor | None] | None = getattr(self._said, "logits", None)
        if found is None:
            found = self._said.logits = {}
        return found

    def take(self, layer: int, tokens: int) -> torch.Tensor | None:
        """[T, E] The logits that led to what the layer is asked for now; None where nobody saw them."""
        logits = self._by_layer().pop(layer, None)
        return logits if logits is not None and len(logits) == tokens else None

    def ask(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """[T, E] What the router of a layer says of tokens [T, H] that are not its own; None where it cannot tell."""
        router = self._routers[layer]
        if router is None or self._widths[layer] != hidden.shape[-1]:
            return None
        with torch.no_grad():  # not by calling it: hooks of transformers and of users take what it says for its layer's
            logits = _logits_in(router.forward(hidden), self._experts)
        return logits if logits is not None and len(logits) == len(hidden) else None

    def close(self) -> None:
        """Note nothing more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def candidates(chosen: torch.Tensor, logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token that were chosen, and those that came nearest to it, with what the router thought of them.

    Args:
        chosen: [T, K]
        logits: [T, E]
        width: W, from K to E.

    Returns:
        [T, W] experts, the chosen ones first, and [T, W] the softmax of their logits.
    """
    scores = torch.softmax(logits.detach().float(), dim=-1)
    others = scores.scatter(1, chosen, -1.0).topk(width - chosen.shape[1], dim=-1).indices
    ids = torch.cat((chosen, others), dim=1)
    return ids, scores.gather(1, ids)


def _router_of(module: nn.Module, layer: ExpertLayer, experts: int) -> nn.Module | None:
    """The neighbour of a layer's experts that has a row of weights for each of them."""
    above, _, name = layer.path.rpartition(".")
    neighbours = dict(module.get_submodule(above).named_children())
    neighbours.pop(name)
    for key in sorted(neighbours, key=lambda key: key not in _NAMES):
        weights = [p for p in neighbours[key].parameters() if p.dim() == 2 and len(p) == experts]
        if len(weights) == 1:
            return neighbours[key]
    return None


def _width_asked(router: nn.Module, experts: int) -> int | None:
    """H of the tokens [T, H] that a router can be asked about; None where it wants to be told more than that."""
    named = [p for p in inspect.signature(router.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    needed = [p for p in named if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if len(needed) != 1 or needed[0].kind is needed[0].KEYWORD_ONLY:
        return None
    return next(p.shape[1] for p in router.parameters() if p.dim() == 2 and len(p) == experts)


def _logits_in(output: Any, experts: int) -> torch.Tensor | None:
    """[T, E] The first tensor of a router's results that has a value for each expert."""
    for value in output if isinstance(output, tuple | list) else (output,):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() and value.shape[-1] == experts:
            return value.detach().reshape(-1, experts)
    return None
