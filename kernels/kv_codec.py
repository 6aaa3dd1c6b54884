"""Keys and values in few bits: KIVI's arrangement (arXiv 2402.02750), keys by channel and values by token.

    x ≈ low + level · step,    step = (high − low) / (2^bits − 1),    |error| ≤ step / 2 and rounding

Channels of keys differ in size, and stay as they are from token to token: so a channel of a block has a range. Values
have no such channels, so a token has one. Ranges are in fp32. Which blocks are coded is not known here.
"""

from __future__ import annotations

from typing import Final

import torch

BITS: Final = {"int8": 8, "int4": 4}
"""Of each codec."""
RANGE_NBYTES: Final = 8
"""Of a range: the least value and a step, in fp32."""


def width(dim: int, bits: int) -> int:
    """Bytes of a vector's levels: two of 4 bits share one."""
    return dim if bits == 8 else -(-dim // 2)


def encode(values: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels, and the ranges of what lies along an axis.

    Args:
        values: [..., tokens, dim], finite, of any floating dtype.
        bits: 8 or 4.
        axis: −2 where channels have ranges (keys), −1 where tokens have (values).

    Returns:
        Levels [..., tokens, width], uint8; the least value and the step of each range, without that axis, fp32.
    """
    wide = values.float()
    low, high = wide.amin(dim=axis, keepdim=True), wide.amax(dim=axis, keepdim=True)
    top = 2**bits - 1
    step = (high - low) / top
    levels = ((wide - low) / step.masked_fill(step == 0, 1.0)).round_().clamp_(0, top).to(torch.uint8)
    return (_packed(levels) if bits == 4 else levels), low.squeeze(axis), step.squeeze(axis)


def decode(
    levels: torch.Tensor, low: torch.Tensor, step: torch.Tensor, *, bits: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """What `encode` left, [..., dim].

    Args:
        levels: [..., width].
        low: Broadcast to [..., dim].
        step: Likewise.
        bits: 8 or 4.
        dim: Of a vector.
        dtype: Of the result.
    """
    plain = _unpacked(levels, dim) if bits == 4 else levels
    return torch.addcmul(low, plain.float(), step).to(dtype)


def _packed(levels: torch.Tensor) -> torch.Tensor:
    if levels.shape[-1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    return levels[..., 0::2] | levels[..., 1::2] << 4


def _unpacked(levels: torch.Tensor, dim: int) -> torch.Tensor:
    both = torch.stack([levels & 15, levels >> 4], dim=-1)
    return both.flatten(-2)[..., :dim]
