"""Operands whose products show in which order they were summed.

Of random operands, results of bf16 hide nearly always that two kernels add up in different orders: sums are rounded in
fp32, and one in some thousand of them lies so that the last bit of eight shows it. Here a quarter of the terms is huge,
and a second quarter takes them away again exactly. What is left is the sum of the others, with what fp32 lost while a
huge term was in the accumulator: that depends on the order, and is as large as the result.
"""

from __future__ import annotations

from typing import Final

import torch

_EXPONENTS: Final = {torch.float16: 14}
"""Of the huge terms, where 18 would not fit the dtype."""


def revealing_columns(columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the huge terms, and those of the terms that take each of them away: [columns // 4] each."""
    order = torch.randperm(columns, generator=generator, device=generator.device)
    return order[: columns // 4], order[columns // 4 : 2 * (columns // 4)]


def reveal_in_operand(x: torch.Tensor, huge: torch.Tensor, away: torch.Tensor) -> None:
    """Make x [..., K] of random numbers an operand of such products, in place; overlapping ones stay as they are."""
    view = x
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            view = view.narrow(dim, 0, 1)  # what is only expanded is written once
    if torch._debug_has_internal_overlap(view) or not view.numel():
        return
    some = view[..., huge].float()
    made = (some.sign() * (1 + some.abs().clamp(max=1)) * 2.0 ** _EXPONENTS.get(x.dtype, 18)).to(x.dtype)
    view[..., huge] = made
    view[..., away] = made


def reveal_in_weight(weight: torch.Tensor, huge: torch.Tensor, away: torch.Tensor) -> None:
    """Make a weight [N, K] of random numbers the other operand, in place."""
    weight[:, away] = -weight[:, huge]
