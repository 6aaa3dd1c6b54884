"""Element type conversion on raw bytes, bit-equal to `torch.Tensor.to`.

It runs on I/O threads, so it uses numpy (which releases the GIL and starts no threads of its own) rather than torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


def castable(source: str, target: str) -> bool:
    """Whether `cast` can convert between two dtypes."""
    known = {"F16", "BF16", "F32", "F64"}
    return source == target or (source in known and target in known)


def cast(data: memoryview, out: memoryview, source: str, target: str) -> None:
    """Convert `data` from dtype `source` to dtype `target` into `out` (exactly as long as the result).

    Rounds to nearest even; a NaN stays a NaN. As in torch, F64 becomes F16 or BF16 by way of F32, which rounds twice.
    """
    assert castable(source, target), (source, target)
    if source == target:
        out[:] = data
        return
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and signalling NaNs are ordinary values here
        values = _widen(data, source)
        if target == "BF16":
            np.copyto(np.frombuffer(out, np.uint16), _to_bfloat16(_single(values)))
        elif target == "F16":
            np.copyto(np.frombuffer(out, np.float16), _single(values), casting="unsafe")
        else:
            np.copyto(np.frombuffer(out, _NUMPY[target]), values, casting="unsafe")


def _widen(data: memoryview, source: str) -> NDArray[np.float32] | NDArray[np.float64]:
    if source == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    values: NDArray[Any] = np.frombuffer(data, _NUMPY[source])
    return values if source == "F64" else _single(values)


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32, copy=False)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
