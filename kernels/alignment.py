"""Whether CPU kernels give other bits for operands that do not start on a 64-byte boundary.

Seen with torch 2.13 on AVX-512: a float32 matrix–vector product depends on the alignment of the matrix modulo 16,
bfloat16 and float16 products on none.
"""

from __future__ import annotations

import torch
from torch.nn import functional

SHAPES = ((176, 64), (96, 257), (640, 512))
BATCHES = (1, 2, 8, 33)


def alignment_changes_bits(dtype: torch.dtype, skew: int) -> bool:
    """Probe linear layers of several shapes with a weight that starts `skew` bytes after a 64-byte boundary."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    if skew % itemsize:
        return True
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        store = torch.empty(weight.nbytes + 128, dtype=torch.uint8)
        start = -store.data_ptr() % 64 + skew
        moved = store[start : start + weight.nbytes].view(torch.uint8)
        moved.copy_(weight.view(-1).view(torch.uint8))
        skewed = _view(moved, dtype, (rows, columns))
        for batch in BATCHES:
            x = torch.randn(batch, columns, generator=generator).to(dtype)
            if not torch.equal(functional.linear(x, weight), functional.linear(x, skewed)):
                return True
    return False


def _view(raw: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Reinterpret bytes whose storage offset need not be a multiple of the element size."""
    return torch.frombuffer(raw.numpy(), dtype=dtype).view(shape)
