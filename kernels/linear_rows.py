"""Linear layers whose weight comes in pieces of rows, and the probe that says whether the pieces give the same bits.

y = x Wᵀ + b, with W cut along its rows: each piece gives some columns of y. Every output element is one dot product
over the same operands, but a library may choose another kernel, and another order of summation, for another number of
columns. The probe tries it at the very shape in question.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from math import gcd
from typing import Final

import torch
from torch.nn import functional

PAGE: Final = 4096
PERIOD: Final = 1 << 20
"""Bytes after which the probe's weight repeats, about."""


def reference(x: torch.Tensor, pieces: Sequence[torch.Tensor], bias: torch.Tensor | None = None) -> torch.Tensor:
    """The whole product in one call: what the pieces must reproduce.

    Shapes: x [..., K], pieces [N_i, K] each, bias [ΣN_i]; result [..., ΣN_i].
    """
    return functional.linear(x, torch.cat(list(pieces)), bias)


def linear_piece(
    x: torch.Tensor, piece: torch.Tensor, bias: torch.Tensor | None, start: int, out: torch.Tensor | None
) -> torch.Tensor:
    """One piece: columns `start` to `start + N_i` of the product, into `out` [..., N] if given."""
    stop = start + piece.shape[0]
    part = functional.linear(x, piece, None if bias is None else bias[start:stop])
    if out is None:
        return part
    out[..., start:stop] = part
    return out


def splits_exactly(
    like: torch.Tensor, rows: int, piece_rows: int, *, skew: int = 0, requires_grad: bool = False
) -> bool:
    """Whether pieces of `piece_rows` rows give the bits of the whole [rows, K] on this CPU.

    Everything that a library may choose a kernel by is as in the real product: the shape, strides and dtype of x (those
    of `like` [..., K]), how many bytes after a 64-byte boundary the weight starts (`skew`), and whether it wants a
    gradient (torch folds strided operands by that). The whole weight is never allocated: a little memory is mapped
    again and again, back to back, so that the probe takes the address range of the whole and the memory of a few rows.
    """
    columns, dtype = like.shape[-1], like.dtype
    generator = torch.Generator().manual_seed(0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    x = torch.randn(extent, generator=generator).to(dtype).as_strided(like.shape, like.stride())  # expanded ones too
    unit = columns * x.element_size()
    step = PAGE // gcd(unit, PAGE)
    period = -(-max(1, PERIOD // unit) // step) * step
    with torch.no_grad(), _Repeated(period * unit, -(-rows // period) + 1) as buffer:
        virtual = torch.frombuffer(buffer, dtype=dtype, offset=skew, count=rows * columns).view(rows, columns)
        lent = min(period, rows)
        virtual[:lent].copy_(torch.randn(lent, columns, generator=generator))
        whole = functional.linear(x, virtual.detach().requires_grad_(requires_grad))
        for start in range(0, rows, piece_rows):
            stop = min(start + piece_rows, rows)
            piece = virtual[start:stop].detach().requires_grad_(requires_grad)
            if not torch.equal(functional.linear(x, piece), whole[..., start:stop]):
                return False
    return True


class _Repeated:
    """`count` copies of one anonymous file, mapped back to back."""

    def __init__(self, nbytes: int, count: int) -> None:
        self._nbytes, self._count = nbytes, count
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        three = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *three, ctypes.c_long)
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._address = 0

    def __enter__(self) -> ctypes.Array[ctypes.c_char]:
        fd = os.memfd_create("penstock-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self._nbytes)
            total = self._nbytes * self._count
            both = mmap.PROT_READ | mmap.PROT_WRITE
            # reserve the range, then lay the file over it
            base = self._map(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            self._address = base
            map_fixed = 0x10
            for index in range(self._count):
                self._map(base + index * self._nbytes, self._nbytes, both, mmap.MAP_SHARED | map_fixed, fd)
        except BaseException:
            if self._address:
                self.__exit__()
            raise
        finally:
            os.close(fd)
        return (ctypes.c_char * total).from_address(base)

    def _map(self, address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
        got = self._libc.mmap(address, nbytes, protection, flags, fd, 0)
        if got in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes for the probe")
        return int(got)

    def __exit__(self, *exc: object) -> None:
        self._libc.munmap(self._address, self._nbytes * self._count)
