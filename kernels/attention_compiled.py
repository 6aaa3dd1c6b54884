"""Attention of a few queries to blocks in half precision on a CPU, by functions that are compiled for their shapes.

Compiling takes some tenths of a second, so it begins, in a thread of its own, when a shape is first heard of. Who needs
it waits for it: which way a result is computed never depends on how fast that went.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import torch

from . import machine_code

logger = logging.getLogger(__name__)

ALONE_NBYTES: Final = 256 * 1024
"""Of keys and values up to which the calling thread reads them alone: in some 30 µs, and to wake another takes 10."""
ITEMS: Final = 8
"""For each thread, at least: they take one after another, and end together."""

_DTYPES: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What one function is compiled for."""

    dtype: torch.dtype
    """Of queries, keys and values."""
    dim: int
    value_dim: int
    rows: int
    """Queries of a head."""

    @property
    def is_known(self) -> bool:
        """Whether there is a function for such."""
        return self.dtype in _DTYPES and self.dim % 16 == 0 and self.value_dim % 16 == 0


_functions: Final[dict[Shape, Future[int | None]]] = {}
_making: Final = threading.Lock()


def prepare(shape: Shape) -> Future[int | None]:
    """Begin to compile what will be needed, once: the address, or None where there can be none."""
    with _making:
        future = _functions.get(shape)
        if future is None:
            future = _functions[shape] = Future()
            try:
                threading.Thread(target=_make, args=(shape, future), name="penstock-compile").start()
            except RuntimeError as error:  # there can be no more threads
                logger.warning("attention for %s was not compiled, and is computed by torch: %s", shape, error)
                future.set_result(None)
        return future


def forget() -> None:
    """Compile anew what is needed from here on."""
    with _making:
        _functions.clear()


def _forked() -> None:
    """Nobody will end what other threads were compiling."""
    for shape in [shape for shape, future in _functions.items() if not future.done()]:
        del _functions[shape]
    _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_forked)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, joined: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention to n blocks, by the queries of each, or by the same ones to all of them.

    Args:
        query: [n, kv_heads, rows, dim], or 1 for all n if joined. Gets no gradients.
        keys: [n, kv_heads, tokens, dim], with a token at least.
        values: [n, kv_heads, tokens, value dim].
        scale: Of the products.
        joined: Whether blocks are parts of the same sequences.

    Returns:
        O [parts, kv_heads, rows, value dim] and ℓ [parts, kv_heads, rows] in fp32: n parts, or a few if joined. None
        where no function is compiled for such.
    """
    count, heads, tokens, dim = keys.shape
    shape = Shape(dtype=keys.dtype, dim=dim, value_dim=values.shape[3], rows=query.shape[2])
    if not shape.is_known or query.dtype != keys.dtype or values.dtype != keys.dtype:
        return None
    three = (query, keys, values)
    if any(type(each) is not torch.Tensor or each.stride(3) != 1 for each in three):  # fakes have no addresses
        return None
    function = prepare(shape).result()
    if function is None:
        return None
    alone = count * heads * tokens * (dim + shape.value_dim) * keys.itemsize <= ALONE_NBYTES
    threads = 1 if alone else torch.get_num_threads()
    per_part = -(-count // min(count, -(-ITEMS * threads // heads))) if joined else 1
    parts = -(-count // per_part)
    # Whatever a program has made torch's defaults.
    out = torch.empty(parts, heads, shape.rows, shape.value_dim, dtype=torch.float32, device="cpu")
    lse = torch.empty(parts, heads, shape.rows, dtype=torch.float32, device="cpu")
    (bits,) = struct.unpack("i", struct.pack("f", scale))
    job = (ctypes.c_int64 * 21)(
        0, parts * heads, heads, count, per_part, tokens, bits,
        *_place(query.expand(count, -1, -1, -1) if joined else query), query.stride(2) * 2,
        *_place(keys), keys.stride(2) * 2,
        *_place(values), values.stride(2) * 2,
        out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    machine_code.run(function, job, threads=min(threads, parts * heads))
    return out, lse


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Address, and strides of blocks and heads in bytes: all dtypes here have two."""
    block, head = tensor.stride()[:2]
    return tensor.data_ptr(), 2 * block, 2 * head


def _make(shape: Shape, future: Future[int | None]) -> None:
    try:
        future.set_result(_compiled(shape))
    except Exception as error:  # whatever fails in LLVM, there is another way
        logger.warning("attention for %s was not compiled, and is computed by torch: %s", shape, error)
        future.set_result(None)


def _compiled(shape: Shape) -> int | None:
    fp16 = shape.dtype == torch.float16
    if not machine_code.available() or (fp16 and not machine_code.converts_fp16()):
        return None
    from .attention_registers import Kind, attention

    kind = Kind(fp16=fp16, dim=shape.dim, value_dim=shape.value_dim, rows=shape.rows)
    return machine_code.compiled(lambda: attention(kind), "attend")
