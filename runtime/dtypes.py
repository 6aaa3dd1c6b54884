"""The safetensors format's names for element types, and torch's."""

from __future__ import annotations

from typing import Final

import torch

from ..memory.errors import UsageError

_TORCH: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_STORED: Final = {dtype: name for name, dtype in _TORCH.items()}

_SPELLINGS: Final = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
}


def torch_dtype(stored: str) -> torch.dtype:
    """The torch dtype of a safetensors name, a key of `memory.layout.ITEMSIZE`."""
    return _TORCH[stored]


def stored_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises UsageError where the format has none."""
    if dtype not in _STORED:
        raise UsageError(f"safetensors has no name for {dtype}; known are {', '.join(map(str, _STORED))}")
    return _STORED[dtype]


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype a caller asks a model to have; None for "auto".

    Takes "bf16", "bfloat16", "torch.bfloat16", `torch.bfloat16` and the like. Raises UsageError where a model cannot be
    built in it.
    """
    if dtype == "auto":
        return None
    found = _SPELLINGS.get(dtype.lower().removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _SPELLINGS.values():
        raise UsageError(f"dtype {dtype!r} is not one a model can have; use auto, {', '.join(_SPELLINGS)}")
    return found
