"""Large parameters that are served by rows: embedding tables and output projections, and, where they are asked for as a
whole, experts.

A lookup reads the rows it uses; a product takes the table piece by piece. Neither needs a slot of the table's size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from ..kernels.linear_rows import linear_piece, splits_exactly
from ..kernels.revealing import reveal_in_operand, reveal_in_weight, revealing_columns
from ..memory.disk import DiskEngine
from ..memory.image import ALIGN, Bounce, bounce_window, bounces_of
from ..memory.layout import ITEMSIZE, TensorSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows `start` to `stop`, a block of their own."""

    block: int
    start: int
    stop: int


@dataclass(kw_only=True, eq=False)
class Table:
    """One parameter served by rows."""

    name: str
    parameter: nn.Parameter
    source: TensorSource
    """Where its rows are on disk."""
    dtype: str
    """Element type that the model computes with."""
    skew: int
    """How far after a 64-byte boundary a resident model has the table."""
    pieces: Sequence[Piece]
    """Blocks for products; empty for a table that is only looked up."""
    resident_rows: Callable[[Piece], torch.Tensor | None]
    """The rows of a piece if it is in memory for good, on whichever tier."""
    engine: DiskEngine
    of_experts: bool = False
    """Whether its rows are the experts of a layer, whose blocks are lent to products alone."""
    rows_read_nbytes: int = 0
    """Bytes read for lookups so far, rounding included."""
    _exact: dict[tuple[object, ...], bool] = field(default_factory=dict)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row as the model computes with it."""
        return prod(self.parameter.shape[1:]) * ITEMSIZE[self.dtype]

    def lookup(self, ids: torch.Tensor, *, wrap: bool = False) -> torch.Tensor:
        """Rows `ids` [...] → [..., *row]. Each distinct row is read once; with `wrap`, −1 is the last one.

        Raises:
            IndexError: a row that the table does not have.
            DiskError: a read failed.
        """
        ids = torch.where(ids < 0, ids + self.parameter.shape[0], ids) if wrap else ids
        rows, inverse = torch.unique(ids.reshape(-1), return_inverse=True)
        wanted = rows.cpu()
        count, *row = self.parameter.shape
        if len(wanted) and (int(wanted[0]) < 0 or int(wanted[-1]) >= count):
            wrong = int(wanted[0] if wanted[0] < 0 else wanted[-1])
            raise IndexError(f"{self.name} has {count} rows; asked for row {wrong}")
        found = torch.empty(len(wanted), *row, dtype=self.parameter.dtype)
        missing = torch.ones(len(wanted), dtype=torch.bool)
        for piece in self.pieces:
            here = (wanted >= piece.start) & (wanted < piece.stop)
            held = self.resident_rows(piece) if bool(here.any()) else None
            if held is not None:
                found[here] = held.index_select(0, (wanted[here] - piece.start).to(held.device)).cpu()
                missing &= ~here
        self._read(wanted, missing, found)
        return found.to(self.parameter.device).index_select(0, inverse).view(*ids.shape, *row)

    def _read(self, wanted: torch.Tensor, missing: torch.Tensor, found: torch.Tensor) -> None:
        """Read the rows not in memory, straight into the result."""
        size = self.row_nbytes
        bounces = [
            bounce
            for index in missing.nonzero().flatten().tolist()
            for bounce in self._row_reads(int(wanted[index]), index * size)
        ]
        if bounces:
            raw = found.view(torch.uint8).numpy().data.cast("B")
            self.engine.read([], bounces, raw, urgent=True).wait()
            self.rows_read_nbytes += sum(bounce_window(bounce) for bounce in bounces)

    def _row_reads(self, row: int, offset: int) -> list[Bounce]:
        return bounces_of(self.source.slice_rows(row, row + 1), self.dtype, offset)

    def splits(self, x: torch.Tensor, *, biased: bool = False) -> bool:
        """Whether a product with x [..., K], and a bias, may take pieces one by one and still give the same bits."""
        if not self.pieces:
            return False
        wants_grad = self.parameter.requires_grad
        key = (tuple(x.shape), tuple(x.stride()), x.dtype, wants_grad, biased)
        if key not in self._exact:
            rows = self.parameter.shape[0]
            piece = self.pieces[0].stop - self.pieces[0].start
            if not x.numel():
                exact = True
            elif x.device.type == "cpu":
                exact = splits_exactly(x, rows, piece, skew=self.skew, requires_grad=wants_grad, biased=biased)
            else:
                exact = _splits_exactly_on_device(x, rows, piece)
            if not exact:
                logger.warning(
                    "%s: a product with %s does not give the same bits in pieces; the whole table of %d bytes is "
                    "gathered for it, beyond the budget",
                    self.name,
                    tuple(x.shape),
                    rows * self.row_nbytes,
                )
            self._exact[key] = exact
        return self._exact[key]

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        lend: Callable[[int], tuple[torch.Tensor, Callable[[], None]]],
        elsewhere: Callable[[Piece], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """x Wᵀ + b [..., rows], piece by piece. `lend(block)` gives a piece's tensor and the call that returns it.

        `elsewhere` gives the part of a piece that another processor computes, or None.
        """
        out: torch.Tensor | None = None
        parts = []
        for piece in self.pieces:
            part = None if elsewhere is None else elsewhere(piece)
            if part is not None:
                parts.append(part)
                continue
            weight, give_back = lend(piece.block)
            try:
                parts.append(linear_piece(x, weight, bias, piece.start, out))
            finally:
                give_back()
        return torch.cat(parts, dim=-1)

    def whole(self) -> torch.Tensor:
        """The table in fresh memory: for calls that are neither a lookup nor a product in pieces."""
        logger.info("%s: gathering the whole table, beyond the budget, for a call that needs all of it", self.name)
        return self.rows(0, self.parameter.shape[0]).requires_grad_(self.parameter.requires_grad)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """[stop − start, *row] Rows in fresh memory, read from disk, as far behind a boundary as a resident model has
        them."""
        nbytes = (stop - start) * self.row_nbytes
        store = torch.empty(nbytes + ALIGN, dtype=torch.uint8)
        begin = (self.skew + start * self.row_nbytes - store.data_ptr()) % ALIGN
        bits = store[begin : begin + nbytes]
        shape = (stop - start, *self.parameter.shape[1:])
        found = torch.frombuffer(bits.numpy(), dtype=self.parameter.dtype).view(shape)
        raw = bits.numpy().data
        bounces = bounces_of(self.source.slice_rows(start, stop), self.dtype)
        self.engine.read([], bounces, raw, urgent=True).wait()
        return found.to(self.parameter.device)


def _splits_exactly_on_device(like: torch.Tensor, rows: int, piece_rows: int) -> bool:
    """The same probe on a device that cannot map one page twice: it needs the whole weight for a moment."""
    generator = torch.Generator(like.device).manual_seed(0)  # the user's must not advance: sampling would change
    try:
        weight = torch.empty(rows, like.shape[-1], dtype=like.dtype, device=like.device).normal_(generator=generator)
    except torch.OutOfMemoryError:
        return False
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    x.normal_(generator=generator)
    huge, away = revealing_columns(like.shape[-1], generator)
    reveal_in_operand(x, huge, away)
    reveal_in_weight(weight, huge, away)
    whole = nn.functional.linear(x, weight)
    spans = [(start, min(start + piece_rows, rows)) for start in range(0, rows, piece_rows)]
    return all(torch.equal(nn.functional.linear(x, weight[a:b]), whole[..., a:b]) for a, b in spans)
