"""Who attends to which of some blocks that lie beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """A whole block as a part of a row."""

    row: int
    position: int
    """Of its first token, padding counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Neighbouring blocks that equally many rows attend to."""

    first: int
    """Number of the first one."""
    rows: torch.Tensor
    """[blocks, rows of each]."""
    positions: torch.Tensor
    """Likewise."""
    alike: tuple[int, ...] | None
    """The rows, where all of them are parts of the same ones."""

    @property
    def count(self) -> int:
        """Of the blocks."""
        return self.rows.shape[0]


def spans(uses: Sequence[Sequence[Use]]) -> tuple[Span, ...]:
    """Put together what can be attended to at once.

    Args:
        uses: Of each block; none where nobody wants it.
    """
    return tuple(_spans(uses))


def _spans(uses: Sequence[Sequence[Use]]) -> Iterator[Span]:
    start = 0
    for at in range(1, len(uses) + 1):
        if at < len(uses) and len(uses[at]) == len(uses[start]):
            continue
        if uses[start]:
            rows = torch.tensor([[use.row for use in block] for block in uses[start:at]])
            positions = torch.tensor([[use.position for use in block] for block in uses[start:at]])
            alike = tuple(rows[0].tolist()) if bool((rows == rows[0]).all()) else None
            yield Span(first=start, rows=rows, positions=positions, alike=alike)
        start = at
