"""Exact attention over all tiers: partial results of what lies where it lies, merged by their log-sum-exp in fp32.

What was there before this call is seen by all of its queries, so blocks need no mask unless a model brings one of its
own; what is new is at hand as tensors. Blocks are attended to in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch

from ...kernels.attention_merge import Merging, merge
from ...kernels.attention_paged import paged_partial
from ...kernels.attention_partial import causal, flashes, partial
from ...kernels.attention_wide import Widening
from .spread import Span

FEW_ROWS: Final = 32
"""Queries of a head, up to which each block is a part of its own. With more, blocks are put together first: their copy
costs less than merging so many results."""
PARTS_NBYTES: Final = 16 * 2**20
"""Of results that wait to be merged: those of a layer, in decoding."""
QUERIES: Final = 512
"""Of new tokens that attend to each other at once: a mask is as large as the square of it."""

_CPU: Final = torch.device("cpu")

Blocks = tuple[torch.Tensor, torch.Tensor, tuple[Span, ...]]
"""Keys and values [blocks, kv_heads, tokens, dim], and whose they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a layer asks in one call. S positions are there before it, Q come with it."""

    query: torch.Tensor
    """[rows, heads, Q, dim]."""
    keys: torch.Tensor
    """New ones: [rows, kv_heads, Q, dim]."""
    values: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    """[rows or 1, heads or 1, Q, S + Q], bool or added to scores; None where all see what is before them."""
    cap: float | None = None
    """Soft limit of the scores (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[heads]: the score of a key without a value, which takes a part of the attention (gpt-oss)."""
    paddings: tuple[int, ...] = ()
    """Of each row, in positions."""
    before: int = 0
    """S."""
    cold: bool = True
    """Whether blocks may lie outside of the device that computes: queries are brought down first then, before it has
    work of its own to end."""
    widening: Widening = field(default_factory=Widening)
    """Memory of who asks."""

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.query.shape[1] // self.keys.shape[1]


def attend(asked: Asked, blocks: Iterator[Blocks]) -> torch.Tensor:
    """Attention to what is in blocks and to what is new: [rows, Q, heads, value dim], in the queries' dtype.

    Blocks are attended to by the processor in whose memory they are.
    """
    return finish(asked, merged(asked, blocks))


def merged(asked: Asked, blocks: Iterator[Blocks]) -> Merging:
    """The same as it is merged, sinks left out: [rows, kv_heads, group · Q, value dim], and the log of its sum."""
    rows, heads, count, dim = asked.query.shape
    query = asked.query.reshape(rows, heads // asked.group, asked.group * count, dim)
    shape = (*query.shape[:3], asked.values.shape[3])
    sides: dict[torch.device, _Parts] = {}
    if count > 1 and asked.cap is None:  # a prompt, whose tokens are followed by single ones
        asked.widening.expect(query.dtype, dim=dim, value_dim=shape[3], rows=asked.group)
    if asked.cold and asked.before and query.device != _CPU:
        sides[_CPU] = _Parts(Merging.of(shape, _CPU), query.to(_CPU))
    for keys, values, spans in blocks:
        parts = sides.get(keys.device)
        if parts is None:
            parts = sides[keys.device] = _Parts(Merging.of(shape, keys.device), query.to(keys.device))
        for span in spans:
            part = slice(span.first, span.first + span.count)
            _attend_span(parts, asked, keys[part], values[part], span)
    merging = _together(sides, shape, query.device)
    for start, stop, out, lse in _new(asked):
        _add_new(merging, asked, start, stop, out, lse)
    return merging


def finish(asked: Asked, merging: Merging) -> torch.Tensor:
    """What a model gets of what was merged: [rows, Q, heads, value dim], with sinks, in the queries' dtype."""
    rows, heads, count, _ = asked.query.shape
    kv_heads = heads // asked.group
    if asked.sinks is not None:
        sinks = asked.sinks.detach().to(merging.lse.device, torch.float32).view(1, kv_heads, asked.group, 1)
        _take_for_sinks(merging, sinks.expand(-1, -1, -1, count).reshape(1, kv_heads, -1))
    out = merging.out.view(rows, kv_heads, asked.group, count, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(rows, count, heads, -1).to(device=asked.query.device, dtype=asked.query.dtype)


def _together(sides: dict[torch.device, _Parts], shape: tuple[int, ...], home: torch.device) -> Merging:
    """What all processors found, where the queries are."""
    for parts in sides.values():
        parts.merge()
    own = sides.pop(home, None)
    merging = Merging.of(shape, home) if own is None else own.merging
    for parts in sides.values():
        merging.add(parts.merging.out.to(home), parts.merging.lse.to(home))
    return merging


class _Parts:
    """Results of blocks, merged when there are many: merging some at a time would take as long as attending to them.

    Args:
        merging: Where they go.
        query: [rows, kv_heads, queries, dim].
    """

    def __init__(self, merging: Merging, query: torch.Tensor) -> None:
        self.merging = merging
        self.query = query
        self._together: dict[tuple[int, ...], torch.Tensor] = {}
        self._parts: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._nbytes = 0

    def together(self, rows: tuple[int, ...]) -> torch.Tensor:
        """Queries of these rows as rows of one product: [1, kv_heads, queries, dim]."""
        if rows not in self._together:
            # An index would have to be sent to a device, and that be waited for.
            those = self.query if rows == tuple(range(len(self.query))) else self.query[list(rows)]
            self._together[rows] = those.transpose(0, 1).reshape(1, those.shape[1], -1, those.shape[3])
        return self._together[rows]

    def add(self, rows: tuple[int, ...], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Results of blocks for such queries: [blocks, kv_heads, queries, dim]."""
        self._parts.setdefault(rows, []).append((out, lse))
        self._nbytes += out.nbytes
        if self._nbytes > PARTS_NBYTES:
            self.merge()

    def merge(self) -> None:
        """Merge all that came."""
        for rows, parts in self._parts.items():
            out, lse = merge(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
            out = out.view(out.shape[0], len(rows), -1, out.shape[-1]).transpose(0, 1)
            lse = lse.view(out.shape[1], len(rows), -1).transpose(0, 1)
            self.merging.add(out, lse, None if rows == tuple(range(len(self.query))) else torch.tensor(rows))
        self._parts.clear()
        self._nbytes = 0


def _attend_span(parts: _Parts, asked: Asked, keys: torch.Tensor, values: torch.Tensor, span: Span) -> None:
    if span.alike is not None:
        _attend_alike(parts, asked, keys, values, span.alike, span.positions)
    elif asked.mask is None and span.rows.shape[1] * parts.query.shape[2] <= FEW_ROWS:
        _attend_each(parts, asked, keys, values, span)
    else:
        for rows in torch.unique(span.rows, dim=0):
            these = (span.rows == rows).all(dim=1).nonzero()[:, 0]
            _attend_alike(parts, asked, keys[these], values[these], tuple(rows.tolist()), span.positions[these])


def _attend_alike(
    parts: _Parts,
    asked: Asked,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: tuple[int, ...],
    positions: torch.Tensor,
) -> None:
    """Blocks that are parts of the same rows, whose queries are rows of one product then."""
    blocks, heads, tokens, _ = keys.shape
    together = parts.together(rows)
    small = asked.mask is None and together.shape[2] <= FEW_ROWS
    if small and keys.device.type == "cuda" and asked.cap is None:
        slots = torch.arange(blocks, dtype=torch.int32, device=keys.device)[None]
        lengths = torch.full((1,), blocks * tokens, dtype=torch.int32, device=keys.device)
        parts.add(rows, *paged_partial(together, keys, values, slots, lengths, scale=asked.scale))
        return
    if small and asked.cap is None and Widening.suits(together, keys, values):
        parts.add(rows, *asked.widening.joined(together, keys, values, scale=asked.scale))
        return
    if small:
        wide = together.expand(blocks, -1, -1, -1)
        parts.add(rows, *partial(wide, keys, values, scale=asked.scale, cap=asked.cap))
        return
    mask = None if asked.mask is None else _mask_of(asked, rows, positions, tokens, keys.device)
    joined = [part.transpose(0, 1).reshape(1, heads, blocks * tokens, -1) for part in (keys, values)]
    parts.add(rows, *partial(together, joined[0], joined[1], scale=asked.scale, mask=mask, cap=asked.cap))


def _attend_each(parts: _Parts, asked: Asked, keys: torch.Tensor, values: torch.Tensor, span: Span) -> None:
    """Blocks of different rows, each with the queries of its own."""
    blocks, users = span.rows.shape
    heads, count, dim = parts.query.shape[1:]
    those = parts.query[span.rows].transpose(1, 2).reshape(blocks, heads, users * count, dim)
    if asked.cap is None and Widening.suits(those, keys, values):
        out, lse = asked.widening.each(those, keys, values, scale=asked.scale)
    else:
        out, lse = partial(those, keys, values, scale=asked.scale, cap=asked.cap)
    out = out.view(blocks, heads, users, count, -1).transpose(1, 2)
    lse = lse.view(blocks, heads, users, count).transpose(1, 2)
    for row in torch.unique(span.rows).tolist():
        mine = span.rows == row
        parts.add((row,), out[mine], lse[mine])


def _mask_of(
    asked: Asked, rows: tuple[int, ...], positions: torch.Tensor, tokens: int, device: torch.device
) -> torch.Tensor:
    """What these rows see of these blocks: [1, kv_heads or 1, rows of the product, tokens of all blocks]."""
    assert asked.mask is not None
    parts = []
    for at, row in enumerate(rows):
        mask = asked.mask[row if asked.mask.shape[0] > 1 else 0]
        seen = (positions[:, at, None] + torch.arange(tokens)).flatten()
        parts.append(_by_group(mask[:, :, seen.to(mask.device)].to(device), asked))
    return torch.cat(parts, dim=1)[None]


def _by_group(mask: torch.Tensor, asked: Asked) -> torch.Tensor:
    """[heads or 1, Q, tokens] → [kv_heads or 1, group · Q, tokens]."""
    heads, count, tokens = mask.shape
    if heads == 1:
        return mask.expand(asked.group, count, tokens).reshape(1, asked.group * count, tokens)
    return mask.reshape(-1, asked.group * count, tokens)


def _new(asked: Asked) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """New tokens among themselves, so many queries at once: those from start to stop, their results by head."""
    count, group = asked.query.shape[2], asked.group
    keys = asked.keys.repeat_interleave(group, dim=1) if group > 1 and count > 1 else asked.keys
    values = asked.values.repeat_interleave(group, dim=1) if group > 1 and count > 1 else asked.values
    if count > 1 and _all_before(asked) and flashes(asked.query, asked.keys, asked.values, cap=asked.cap):
        yield 0, count, *causal(asked.query, keys, values, scale=asked.scale)
        return
    for start in range(0, count, QUERIES):
        stop = min(start + QUERIES, count)
        query = asked.query[:, :, start:stop]
        if count == 1 and group > 1:
            query = query.reshape(query.shape[0], -1, group, query.shape[3])
        mask = _new_mask(asked, start, stop)
        if mask is not None and count == 1 and group > 1:
            mask = mask.expand(-1, asked.query.shape[1], -1, -1).reshape(mask.shape[0], -1, group, stop)
        out, lse = partial(query, keys[:, :, :stop], values[:, :, :stop], scale=asked.scale, mask=mask, cap=asked.cap)
        yield start, stop, out, lse


def _all_before(asked: Asked) -> bool:
    """Whether each new token sees all that come before it: no mask need be made, then."""
    return asked.mask is None and not any(padding > asked.before for padding in asked.paddings)


def _new_mask(asked: Asked, start: int, stop: int) -> torch.Tensor | None:
    before, device = asked.before, asked.query.device
    if asked.mask is not None:
        return asked.mask[:, :, start:stop, before : before + stop].to(device)
    padded = [max(0, padding - before) for padding in asked.paddings]
    if stop == 1 and not any(padded):
        return None
    queries = torch.arange(start, stop, device=device)[:, None]
    tokens = torch.arange(stop, device=device)
    mask = (tokens <= queries)[None]
    if any(padded):
        mask = mask & (tokens >= torch.tensor(padded, device=device)[:, None, None])
    return mask[:, None]


def _add_new(merging: Merging, asked: Asked, start: int, stop: int, out: torch.Tensor, lse: torch.Tensor) -> None:
    rows, kv_heads, _, dim = merging.out.shape
    count = asked.query.shape[2]
    shape = (rows, kv_heads, asked.group, stop - start)
    out, lse = out.reshape(*shape, dim), lse.reshape(shape)
    if stop - start == count:
        merging.add(out.reshape(rows, kv_heads, -1, dim), lse.reshape(rows, kv_heads, -1))
        return
    whole = (rows, kv_heads, asked.group, count)
    some = Merging(
        merging.out.view(*whole, dim)[:, :, :, start:stop].contiguous(),
        merging.lse.view(whole)[:, :, :, start:stop].contiguous(),
    )
    some.add(out, lse)
    merging.out.view(*whole, dim)[:, :, :, start:stop] = some.out
    merging.lse.view(whole)[:, :, :, start:stop] = some.lse


def _take_for_sinks(merging: Merging, sinks: torch.Tensor) -> None:
    """A sink's share of the attention goes to nothing: what was seen keeps the rest."""
    merging.out *= (merging.lse - torch.logaddexp(merging.lse, sinks)).exp()[..., None]
