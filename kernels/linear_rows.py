"""Linear layers whose weight comes in pieces of rows, and the probe that says whether the pieces give the same bits.

y = x Wᵀ + b, with W cut along its rows: each piece gives some columns of y. Every output element is one dot product
over the same operands, but a library may choose another kernel, and another order of summation, for another number of
columns. The probe tries it at the very shape in question.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Final

import torch
from torch.nn import functional

from .linear_samples import copies_agree, copies_weight, linear_by_sample
from .revealing import reveal_in_operand, reveal_in_weight, revealing_columns

PAGE: Final = 4096
PERIOD: Final = 1 << 20
"""Bytes after which the probe's weight repeats, about: more for one that would need too many mappings."""
MAPPINGS: Final = 4096
"""Mappings that the probe makes at most; a process may have 65530 in all."""


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
    some = None if bias is None else bias[start:stop]
    if not (torch.is_grad_enabled() and x.requires_grad) and copies_weight(x, piece, some):
        part = linear_by_sample(x, piece, some)
    else:
        part = functional.linear(x, piece, some)
    if out is None:
        return part
    out[..., start:stop] = part
    return out


def splits_exactly(
    like: torch.Tensor,
    rows: int,
    piece_rows: int,
    *,
    skew: int = 0,
    requires_grad: bool = False,
    biased: bool = False,
) -> bool:
    """Whether pieces of `piece_rows` rows, as `linear_piece` takes them, give the bits of the whole on this CPU.

    Everything that a library may choose a kernel by is as in the real product: the shape, strides and dtype of x (those
    of `like` [..., K]), how many bytes after a 64-byte boundary the weight [rows, K] starts (`skew`), whether it wants
    a gradient (torch folds strided operands by that), and whether there is a bias. The whole weight is never allocated:
    a little memory is mapped again and again, back to back, so that the probe takes the address range of the whole and
    the memory of a few rows. The kernel counts such memory as resident once for each place (RssShmem).
    """
    columns, dtype = like.shape[-1], like.dtype
    generator = torch.Generator().manual_seed(0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    x = torch.randn(extent, generator=generator).to(dtype).as_strided(like.shape, like.stride())  # expanded ones too
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    with torch.no_grad():
        if copies_weight(x, torch.empty(0, requires_grad=requires_grad), bias):
            samples = x.shape[:-2].numel()
            with _virtual(samples * columns, rows, dtype, 0, generator) as transposed:
                return copies_agree(x, transposed.view(samples, columns, rows), piece_rows)
        huge, away = revealing_columns(columns, generator)
        reveal_in_operand(x, huge, away)
        with _virtual(rows, columns, dtype, skew, generator, away_from=(huge, away)) as weight:
            whole = functional.linear(x, weight.detach().requires_grad_(requires_grad), bias)
            for start in range(0, rows, piece_rows):
                stop = min(start + piece_rows, rows)
                piece = weight[start:stop].detach().requires_grad_(requires_grad)
                part = functional.linear(x, piece, None if bias is None else bias[start:stop])
                if not torch.equal(part, whole[..., start:stop]):
                    return False
    return True


@contextmanager
def _virtual(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    skew: int,
    generator: torch.Generator,
    *,
    away_from: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """A matrix [rows, columns] of random numbers that repeat after about PERIOD bytes, which is what it takes.

    `away_from`: the columns of `revealing_columns`, for products that show how they were summed.
    """
    unit = columns * dtype.itemsize
    step = PAGE // gcd(unit, PAGE)
    period = -(-max(1, PERIOD // unit, rows // MAPPINGS) // step) * step
    with _Repeated(period * unit, -(-rows // period) + 1) as buffer:
        made = torch.frombuffer(buffer, dtype=dtype, offset=skew, count=rows * columns).view(rows, columns)
        lent = min(period, rows)
        made[:lent].copy_(torch.randn(lent, columns, generator=generator))
        if away_from is not None:
            reveal_in_weight(made[:lent], *away_from)
        yield made


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
