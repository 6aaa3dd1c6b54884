"""The block table: which blocks each sequence of a batch is made of, in each group of layers.

A sequence is cut from its own first token on, without padding, so that padding takes no bytes and equal beginnings give
equal blocks. Full blocks are sealed: they never change, and rows share them. The last block of a row is its hot tail.
Rows may share a tail too, until one of them appends: then it gets a copy of what the tail holds of it. A row that was
cropped into a sealed block goes on in a copy likewise.

Layers run one after another, so a group may be ahead of the next one by the tokens of this forward: `append` and
`settle` are called per group, all else between forwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...memory.errors import UsageError
from .shape import KvShape
from .tiers import Tiers
from .writes import Part, TableStatistics, Write


@dataclass(kw_only=True, slots=True)
class Block:
    """Some tokens of some sequences."""

    group: int
    index: int
    """Which block of its sequence it is."""
    filled: int = 0
    """Tokens that it holds, of all that ever were a row's."""
    sealed: bool = False
    rows: int = 0
    """That it is a part of."""
    copies: int = 0
    """That are being made of it."""


@dataclass(kw_only=True, slots=True)
class _Row:
    padding: int
    blocks: list[list[int]]
    """Ids, by group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    row: int
    index: int
    start: int
    tokens: int
    position: int
    source: int | None
    """The block that the row has there."""
    fresh: bool
    """Whether a new block is needed."""


class BlockTable:
    """All sequences of one cache. Not thread-safe.

    Args:
        shape: Groups of layers and tokens per block.
        tiers: Where blocks lie; this table's alone.
        paddings: Of each row: how many positions at its beginning hold nothing.
    """

    def __init__(self, shape: KvShape, tiers: Tiers, paddings: Sequence[int]) -> None:
        if not paddings or min(paddings) < 0:
            raise UsageError(f"a batch needs a row, and no padding can be negative: {list(paddings)}")
        if tiers.slot_nbytes < shape.slot_nbytes:
            raise UsageError(f"a block takes {shape.slot_nbytes} bytes, and slots have {tiers.slot_nbytes}")
        self.shape = shape
        self.tiers = tiers
        self._positions = [0] * len(shape.groups)
        self._rows = [_Row(padding=padding, blocks=[[] for _ in shape.groups]) for padding in paddings]
        self._blocks: dict[int, Block] = {}
        self._next = 0
        self._open: dict[int, set[int]] = {}
        """Blocks that were written since the last `settle`, by group."""
        self._copied_from: dict[int, list[tuple[int, int]]] = {}
        """Blocks that are being copied and the tiers that they are pinned in, once for each copy, by group."""
        self._written_nbytes = self._copied_nbytes = 0

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self._rows)

    def positions(self, group: int) -> int:
        """Positions so far, padding counted: the same for all rows."""
        return self._positions[group]

    def padding(self, row: int) -> int:
        """Positions at the beginning of a row that hold nothing."""
        return self._rows[row].padding

    def block(self, block: int) -> Block:
        """What is known of a block; not to be changed."""
        return self._blocks[block]

    def has(self, block: int) -> bool:
        """Whether a block is still a part of a row, or being copied."""
        return block in self._blocks

    def parts(self, row: int, group: int) -> tuple[Part, ...]:
        """The blocks of a row, in order."""
        padding, size = self._rows[row].padding, self.shape.block_tokens
        own = self._own(row, self._positions[group])
        return tuple(
            Part(block=block, position=padding + at * size, tokens=min(size, own - at * size))
            for at, block in enumerate(self._rows[row].blocks[group])
        )

    def last(self, row: int, group: int) -> Part | None:
        """The last block of a row, if the row has only a part of it."""
        padding, size = self._rows[row].padding, self.shape.block_tokens
        at, tokens = divmod(self._own(row, self._positions[group]), size)
        if not tokens:
            return None
        return Part(block=self._rows[row].blocks[group][at], position=padding + at * size, tokens=tokens)

    def alike(self) -> tuple[int, ...]:
        """For each row, the first one that is the same so far: of as much padding, and with all blocks shared."""
        found: list[int] = []
        for row, record in enumerate(self._rows):
            found.append(next((one for one in sorted(set(found)) if self._rows[one] == record), row))
        return tuple(found)

    def pad(self, row: int, padding: int) -> None:
        """More of a row's beginning turns out to be padding: a prompt in pieces tells so as they come.

        Raises:
            UsageError: the row has tokens there already.
        """
        record = self._rows[row]
        if any(record.blocks) or padding < record.padding:
            raise UsageError(
                f"row {row} has tokens after {record.padding} positions of padding; these cannot become {padding} now"
            )
        record.padding = padding

    def missing(self, group: int, tokens: int) -> int:
        """Slots of the fastest tier that appending so many positions to every row takes."""
        return sum(step.fresh for step in self._steps(group, tokens))

    def append(self, group: int, tokens: int) -> tuple[Write, ...]:
        """Lengthen every row by `tokens` positions, in one group of layers.

        What is written is written once for each layer of the group; then `settle` seals what is full.

        Raises:
            DoesNotFitError: the fastest tier has too few free slots. Nothing is changed.
        """
        steps = tuple(self._steps(group, tokens))
        self.tiers.require(sum(step.fresh for step in steps))
        writes = tuple([self._write(group, step) for step in steps])
        self._positions[group] += tokens
        token_nbytes = self.shape.groups[group].token_nbytes
        self._written_nbytes += token_nbytes * sum(write.tokens for write in writes)
        self._copied_nbytes += token_nbytes * sum(w.start for w in writes if w.copied_from is not None)
        return writes

    def settle(self, group: int) -> tuple[int, ...]:
        """All layers of a group have written what was appended, and copied what was to be copied.

        Returns:
            The blocks that are sealed now.
        """
        sealed = []
        for block in sorted(self._open.pop(group, ())):
            record = self._blocks[block]
            if record.filled == self.shape.block_tokens:
                record.sealed = True
                self.tiers.seal(block)
                sealed.append(block)
        for block, tier in self._copied_from.pop(group, ()):
            self.tiers.unpin(block, tier)
            self._blocks[block].copies -= 1
            self._forget(block)
        return tuple(sealed)

    def crop(self, positions: int) -> None:
        """Forget all but so many positions of every row."""
        self._require_settled("crop")
        size, longest = self.shape.block_tokens, max(self._positions)
        for group, now in enumerate(self._positions):
            self._positions[group] = min(now, max(positions, 0))
            for row in range(self.rows):
                blocks = self._rows[row].blocks[group]
                kept = -(-self._own(row, self._positions[group]) // size)
                for block in blocks[kept:]:
                    self._leave(block)
                del blocks[kept:]
        if positions < longest:  # where padding was cropped, tokens may come the next time
            for record in self._rows:
                record.padding = min(record.padding, max(positions, 0))

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i goes on as a copy of what row `sources[i]` is now. There may be more rows than before, or fewer.

        Raises:
            UsageError: there is no such row, or none is left.
        """
        self._require_settled("reorder")
        if not sources or not all(0 <= source < self.rows for source in sources):
            raise UsageError(f"rows {list(sources)} were asked for, and there are rows 0 to {self.rows - 1}")
        before = self._rows
        self._rows = [
            _Row(padding=before[source].padding, blocks=[list(blocks) for blocks in before[source].blocks])
            for source in sources
        ]
        for row in self._rows:
            for block in (block for blocks in row.blocks for block in blocks):
                self._blocks[block].rows += 1
        for row in before:
            for block in (block for blocks in row.blocks for block in blocks):
                self._leave(block)

    def clear(self) -> None:
        """Give up all blocks, settled or not. There are as many rows as before, all empty."""
        for group in list(self._copied_from):
            self._open.pop(group, None)
            self.settle(group)
        self._open.clear()
        self.crop(0)

    def statistics(self) -> TableStatistics:
        """A frozen record of the table."""
        return TableStatistics(
            rows=self.rows,
            tokens=sum(self._own(row, now) for row in range(self.rows) for now in self._positions),
            blocks=len(self._blocks),
            sealed_blocks=sum(block.sealed for block in self._blocks.values()),
            shared_blocks=sum(block.rows > 1 for block in self._blocks.values()),
            written_nbytes=self._written_nbytes,
            copied_nbytes=self._copied_nbytes,
        )

    def _own(self, row: int, positions: int) -> int:
        return max(0, positions - self._rows[row].padding)

    def _steps(self, group: int, tokens: int) -> Iterator[_Step]:
        """What appending comes to, block by block. Of rows that share a tail the last one goes on in it."""
        assert tokens > 0, tokens
        size, now = self.shape.block_tokens, self._positions[group]
        left: Counter[int] = Counter()
        for row, record in enumerate(self._rows):
            at, end = self._own(row, now), self._own(row, now + tokens)
            while at < end:
                index, start = divmod(at, size)
                count = min(size - start, end - at)
                source = record.blocks[group][index] if start else None
                fresh = True
                if source is not None:
                    fresh = self._blocks[source].sealed or self._blocks[source].rows - left[source] > 1
                    left[source] += fresh
                position = record.padding + at - now
                yield _Step(
                    row=row, index=index, start=start, tokens=count, position=position, source=source, fresh=fresh
                )
                at += count

    def _write(self, group: int, step: _Step) -> Write:
        blocks = self._rows[step.row].blocks[group]
        tier = source_slot = None
        if step.fresh:
            block = self._next
            self._next += 1
            self.tiers.admit(block)
            self._blocks[block] = Block(group=group, index=step.index, rows=1)
            if step.source is None:
                blocks.append(block)
            else:
                self._blocks[step.source].copies += 1
                tier = self.tiers.fastest(step.source)
                source_slot = self.tiers.pin(step.source, tier)
                self._copied_from.setdefault(group, []).append((step.source, tier))
                blocks[step.index] = block
                self._leave(step.source)
        else:
            assert step.source is not None, step
            block = step.source
        self._blocks[block].filled = step.start + step.tokens
        self._open.setdefault(group, set()).add(block)
        slot = self.tiers.slot(block, 0)
        assert slot is not None, block
        return Write(
            row=step.row,
            block=block,
            slot=slot,
            start=step.start,
            tokens=step.tokens,
            position=step.position,
            copied_from=step.source if step.fresh else None,
            source_tier=tier,
            source_slot=source_slot,
        )

    def _leave(self, block: int) -> None:
        self._blocks[block].rows -= 1
        self._forget(block)

    def _forget(self, block: int) -> None:
        record = self._blocks[block]
        if not record.rows and not record.copies:
            del self._blocks[block]
            self.tiers.discard(block)

    def _require_settled(self, what: str) -> None:
        if self._open or self._copied_from:
            raise UsageError(f"cannot {what} while a forward is under way: settle its groups first")
