"""What a layer of experts computes, as transformers' `grouped_mm` does, expert by expert.

The same bits need more than the same products. Elementwise functions take another way for rows that lie densely than
for halves of rows, and threads cut them where no expert ends; so gate and activation are applied once, to the rows of
all experts together, between the first products of all of them and the second ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Lend = Callable[[int, int], AbstractContextManager[torch.Tensor]]
"""(part, expert) → the weight of that part, [outputs, inputs] or transposed, for as long as the context lasts."""


class Grouped:
    """Tokens of one call, sorted by expert.

    Args:
        hidden: [T, H] Tokens, at least one.
        chosen: [T, K] Their experts.
        weights: [T, K] How much each counts.
        experts: E, of the layer.

    Raises:
        IndexError: a token asks for an expert that the layer has not got.
    """

    def __init__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
        self._top_k = chosen.size(-1)
        self._hidden = hidden
        self._ids, self._order = torch.sort(chosen.reshape(-1))
        self._weights = weights.reshape(-1)[self._order]
        counts = torch.bincount(self._ids, minlength=experts)
        if len(counts) > experts:
            raise IndexError(f"a token asks for expert {len(counts) - 1} of {experts}, counted from 0")
        ends = torch.cumsum(counts, 0).tolist()
        self._rows = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        """By expert."""

    def compute(self, module: Any, order: Sequence[int], lend: Lend) -> torch.Tensor:
        """[T, H] What the layer gives.

        Args:
            module: Holds everything but the weights of the products.
            order: The experts that are used, in any order.
            lend: Gives weights, of part 0 for all of `order` first, then of part 1.
        """
        state = self._hidden[self._order // self._top_k]
        state = self._product(module, state, 0, order, lend)
        if module.has_bias:
            state.add_((module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[self._ids])
        state = module._apply_gate(state) if module.has_gate else module.act_fn(state)
        state = self._product(module, state, 1, order, lend)
        if module.has_bias:
            state.add_(module.down_proj_bias[self._ids])
        if getattr(module, "has_post_expert_norm", False):
            state = module.post_expert_norm(state)
        weighted = state * self._weights.unsqueeze(-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(self._order), device=back.device)
        tokens, width = self._hidden.shape
        summed = weighted[back].view(tokens, self._top_k, width).sum(dim=1)
        return summed.to(self._hidden.dtype)

    def _product(self, module: Any, state: torch.Tensor, part: int, order: Sequence[int], lend: Lend) -> torch.Tensor:
        """One product for each expert, with the rows of its tokens."""
        out: torch.Tensor | None = None
        device = state.device.type
        # `grouped_mm` takes no part in autocasting, and a product into given memory may not.
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with plain:
            for expert in order:
                with lend(part, expert) as weight:
                    if out is None:
                        state = state.to(weight.dtype)
                        out = state.new_empty(len(state), weight.shape[1 if module.is_transposed else 0])
                    rows = self._rows[expert]
                    torch.mm(state[rows], weight if module.is_transposed else weight.t(), out=out[rows])
        assert out is not None, "there is nothing to compute without tokens"
        return out
