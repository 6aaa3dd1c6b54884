"""What a layer of experts computes, as transformers' `grouped_mm` does, expert by expert.

The same bits need more than the same products. Elementwise functions take another way for rows that lie densely than
for halves of rows, and threads cut them where no expert ends; so gate and activation are applied once, to the rows of
all experts together, between the first products of all of them and the second ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Lend = Callable[[int, int], AbstractContextManager[torch.Tensor]]
"""(part, expert) → the weight of that part, [outputs, inputs] or transposed, for as long as the context lasts."""


class Share:
    """Some experts of a call, with all tokens of each.

    Args:
        hidden: [N, H] The tokens, sorted by expert.
        ids: [N] The expert of each.
        rows: By expert, which of them are its.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        rows: Mapping[int, slice],
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._hidden = hidden
        self._ids = ids
        self._rows = rows
        self._biases = biases
        """Of each token's expert, for both products, where they had to be fetched from elsewhere."""

    def to(self, device: torch.device, module: Any) -> Share:
        """The same, to be computed there, with a module's biases: fetched by this thread, whose stream they are for."""
        biases = None
        if module.has_bias:
            biases = self._bias(module, 0).to(device), self._bias(module, 1).to(device)
        return Share(self._hidden.to(device), self._ids.to(device), self._rows, biases)

    @property
    def hidden(self) -> torch.Tensor:
        """[N, H] The tokens, sorted by expert."""
        return self._hidden

    @property
    def rows(self) -> Mapping[int, slice]:
        """By expert, which of them are its."""
        return self._rows

    def activated(self, module: Any, state: torch.Tensor) -> torch.Tensor:
        """[N, I] What the second products take, from what the first ones gave."""
        if module.has_bias:
            state.add_(self._bias(module, 0))
        activated: torch.Tensor = module._apply_gate(state) if module.has_gate else module.act_fn(state)
        return activated

    def finished(self, module: Any, state: torch.Tensor) -> torch.Tensor:
        """[N, H] What the experts make of the tokens, from what the second products gave."""
        if module.has_bias:
            state.add_(self._bias(module, 1))
        if getattr(module, "has_post_expert_norm", False):
            state = module.post_expert_norm(state)
        return state

    def _bias(self, module: Any, part: int) -> torch.Tensor:
        """[N, …] Of each token's expert."""
        if self._biases is not None:
            return self._biases[part]
        return _biases_of(module)[part].to(self._ids.device)[self._ids]


def compute_shares(shares: Sequence[Share], module: Any, order: Sequence[int], lend: Lend) -> list[torch.Tensor]:
    """[N, H] for each share: what the experts make of its tokens.

    Every share has its own products, so that its bits do not depend on the others. An expert is lent once for all of
    them.

    Args:
        shares: With tokens each.
        module: Holds everything but the weights of the products.
        order: All experts that they use, in any order.
        lend: Gives weights, of part 0 for all of `order` first, then of part 1.
    """
    states = [share.hidden for share in shares]
    _multiply(shares, states, module, 0, order, lend)
    for number, share in enumerate(shares):
        states[number] = share.activated(module, states[number])
    _multiply(shares, states, module, 1, order, lend)
    return [share.finished(module, state) for share, state in zip(shares, states, strict=True)]


def _multiply(
    shares: Sequence[Share], states: list[torch.Tensor], module: Any, part: int, order: Sequence[int], lend: Lend
) -> None:
    """Replace the state of each share by what one product for each expert, with the rows of its tokens, makes of it."""
    if not shares:
        return
    device = states[0].device.type
    made: list[torch.Tensor] = []
    # `grouped_mm` takes no part in autocasting, and a product into given memory may not.
    plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with plain:
        for expert in order:
            with lend(part, expert) as weight:
                if not made:
                    states[:] = [state.to(weight.dtype) for state in states]
                    width = weight.shape[1 if module.is_transposed else 0]
                    made += [state.new_empty(len(state), width) for state in states]
                factor = weight if module.is_transposed else weight.t()
                for share, state, out in zip(shares, states, made, strict=True):
                    rows = share.rows.get(expert)
                    if rows is not None:
                        torch.mm(state[rows], factor, out=out[rows])
    assert made, "there is nothing to compute without tokens"
    states[:] = made


def _biases_of(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, …] Of both products."""
    return module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias


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

    def share(self) -> Share:
        """All experts that are used."""
        rows = {expert: rows for expert, rows in enumerate(self._rows) if rows.stop > rows.start}
        return Share(self._hidden[self._order // self._top_k], self._ids, rows)

    def shares(self, first: Collection[int]) -> tuple[tuple[Share, torch.Tensor], tuple[Share, torch.Tensor]]:
        """Some experts, and the others, each with the places of their rows among those of all. Either may have none."""
        used = [expert for expert, rows in enumerate(self._rows) if rows.stop > rows.start]
        return (
            self._some([expert for expert in used if expert in first]),
            self._some([expert for expert in used if expert not in first]),
        )

    def _some(self, experts: Sequence[int]) -> tuple[Share, torch.Tensor]:
        rows, at = {}, 0
        for expert in experts:
            count = self._rows[expert].stop - self._rows[expert].start
            rows[expert] = slice(at, at + count)
            at += count
        device = self._order.device
        places = [torch.arange(self._rows[each].start, self._rows[each].stop, device=device) for each in experts]
        joined = torch.cat(places) if places else torch.empty(0, dtype=torch.long, device=device)
        return Share(self._hidden[self._order[joined] // self._top_k], self._ids[joined], rows), joined

    def summed(self, state: torch.Tensor) -> torch.Tensor:
        """[T, H] What the layer gives, from what all experts made of their tokens, [T · K, H]."""
        weighted = state * self._weights.unsqueeze(-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(self._order), device=back.device)
        tokens, width = self._hidden.shape
        summed = weighted[back].view(tokens, self._top_k, width).sum(dim=1)
        return summed.to(self._hidden.dtype)


def compute_together(tokens: Sequence[Grouped], module: Any, order: Sequence[int], lend: Lend) -> list[torch.Tensor]:
    """[T, H] for the tokens of each call: what the layer gives, computed by one processor; see `compute_shares`."""
    states = compute_shares([each.share() for each in tokens], module, order, lend)
    return [each.summed(state) for each, state in zip(tokens, states, strict=True)]
