"""Memory that updates of flat arrays need beside their operands, and how long the pieces are that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

SUBCHUNK: Final = 256 * 1024
"""Elements of a sub-chunk: with AdamW, five fp32 arrays of it and two half ones are 6 MiB. Python takes 20 µs for each,
which is 5 % of one core's time, and 25 % at 32 Ki; and larger ones leave the cache."""

ALONE: Final = 32 * 1024
"""Elements up to which torch works in the calling thread alone. Beyond, it shares the work among its threads."""

GRAIN: Final = 64
"""Arrays may be cut at multiples of this many elements: no register and no unrolled loop of torch's spans more."""


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Memory that updates need beside their operands, made once. One per thread: it is not to be shared."""

    elements: int
    """Length of a sub-chunk, and of each array below."""
    wide: torch.Tensor
    """fp32: where a gradient becomes fp32. A rule may write to it."""
    work: torch.Tensor
    """fp32: for the rule's own use."""
    halves: Mapping[torch.dtype, torch.Tensor]
    """One array of bf16 and one of fp16."""

    @classmethod
    def of(cls, elements: int = SUBCHUNK, device: torch.device | None = None) -> Scratch:
        """Make one, in the memory of a device, where that is apart from the host.

        Raises:
            ValueError: `elements` is not a positive multiple of GRAIN.
        """
        if elements < GRAIN or elements % GRAIN:
            raise ValueError(f"sub-chunks of {elements} elements: use a positive multiple of {GRAIN}, like {SUBCHUNK}")
        wide, work = (torch.empty(elements, dtype=torch.float32, device=device) for _ in range(2))
        halves = {dtype: torch.empty(elements, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float16)}
        return cls(elements=elements, wide=wide, work=work, halves=halves)

    @property
    def nbytes(self) -> int:
        """Bytes held: 12 for each element."""
        return sum(array.nbytes for array in (self.wide, self.work, *self.halves.values()))

    def first(self, elements: int) -> Scratch:
        """The first elements of every array, which are shared."""
        if elements == self.elements:
            return self  # slicing costs more than all else that Python does for a sub-chunk
        halves = {dtype: array[:elements] for dtype, array in self.halves.items()}
        return Scratch(elements=elements, wide=self.wide[:elements], work=self.work[:elements], halves=halves)
