"""Attention of one sequence to keys that were chosen for each head, and how much attention each of them got.

    s = scale · q Kᵀ,    ℓ = log Σ exp s,    w = exp(s − ℓ),    O = w V

Keys were gathered: heads may have different numbers of them, so what is beyond a head's number is hidden. There are as
many as a policy's budget, so they are widened to fp32 as a whole.
"""

from __future__ import annotations

import torch

from .attention_merge import EMPTY


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_chosen` in double precision, head by head and row by row. Shapes as there."""
    heads, rows, _ = query.shape
    out = torch.zeros(heads, rows, values.shape[2], dtype=torch.float64)
    lse = torch.full((heads, rows), EMPTY, dtype=torch.float64)
    weights = torch.zeros(heads, rows, keys.shape[1], dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            scores = keys[head].double() @ query[head, row].double() * scale
            if cap is not None:
                scores = torch.tanh(scores / cap) * cap
            if bias is not None:
                scores = scores + bias.expand(heads, rows, -1)[head, row].double()
            if bool((scores > EMPTY).any()):
                lse[head, row] = torch.logsumexp(scores, dim=0)
                weights[head, row] = (scores - lse[head, row]).exp()
                out[head, row] = weights[head, row] @ values[head].double()
    return out.float(), lse.float(), weights.float()


def attend_chosen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to what was gathered.

    Args:
        query: [kv_heads, rows, dim]: rows are the heads of a group, times queries.
        keys: [kv_heads, tokens, dim].
        values: [kv_heads, tokens, value dim].
        scale: Of the products.
        bias: Added to scores, −∞ where nothing may be seen; broadcast to [kv_heads, rows, tokens].
        cap: Scores are kept between −cap and cap.

    Returns:
        The result [kv_heads, rows, value dim], ℓ [kv_heads, rows], and the attention that each key got,
        [kv_heads, rows, tokens], all in fp32; 0, −∞ and 0 where nothing can be seen.
    """
    scores = query.float() @ keys.float().transpose(1, 2) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(lse.masked_fill(lse == EMPTY, 0.0)[..., None]).exp_()
    return weights @ values.float(), lse, weights
