"""Plain types that say where bytes lie: in files, and inside a block. No I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

ITEMSIZE: Final[dict[str, int]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes per element of each dtype, by the name that the safetensors format gives it. These names are used everywhere
below the `runtime` room, which maps them to torch dtypes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSpan:
    """A run of bytes in a file."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """Where a tensor's bytes come from. The spans, one after another, are the tensor in row-major order."""

    shape: tuple[int, ...]
    dtype: str
    """Element type as stored, a key of `ITEMSIZE`."""
    spans: tuple[FileSpan, ...]
    skew: int | None = None
    """Bytes after a 64-byte boundary at which a resident model has it; None where it maps the file as it is."""

    def __post_init__(self) -> None:
        assert sum(span.nbytes for span in self.spans) == self.nbytes, (self.shape, self.dtype, self.spans)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def slice_rows(self, start: int, stop: int) -> TensorSource:
        """Rows `start` to `stop` of dimension 0, as a source of its own."""
        row = self.nbytes // self.shape[0]
        lo, hi = start * row, stop * row
        spans = []
        at = 0
        for span in self.spans:
            a, b = max(lo, at), min(hi, at + span.nbytes)
            if a < b:
                spans.append(FileSpan(path=span.path, offset=span.offset + a - at, nbytes=b - a))
            at += span.nbytes
        skew = None if self.skew is None else (self.skew + lo) % 64
        return TensorSource(shape=(stop - start, *self.shape[1:]), dtype=self.dtype, spans=tuple(spans), skew=skew)
