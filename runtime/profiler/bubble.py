"""Time in which nothing computed, and what it waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .intervals import Intervals, Ints, Mask, distinct
from .profile import Columns, Profile
from .schema import NONE, Compute, Link, Step, Transfer, Use, Wait
from .summary import Idle
from .window import Window, ended

CAUSES = Idle.__struct_fields__
"""Names of what an idle instant can be charged to: disk, link, space, host, other."""
DISK, LINK, SPACE, HOST, OTHER = range(len(CAUSES))


def computing(profile: Profile) -> Intervals:
    """When at least one recorded module computed: the spans of compute less the waits for blocks."""
    spans, waits = profile[Compute], profile[Wait]
    return Intervals.union(spans.start, spans.end) - Intervals.union(waits.needed, waits.ready)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bubble:
    """The idle instants of a window in pieces, each charged to one cause and one block.

    An instant is charged to the use that is met next: one that waits is met when its block is there.
    """

    pieces: Intervals
    cause: Ints
    """Index into CAUSES."""
    block: Ints
    """The block of the next use; -1 where there is none."""

    @staticmethod
    def of(profile: Profile, start: int, end: int, *, busy: Intervals | None = None) -> Bubble:
        """The bubble of [start, end). `busy` is `computing(profile)`, where the caller has it already."""
        busy = computing(profile) if busy is None else busy
        gaps = Intervals.one(start, end) - busy.clip(start, end)
        moves = profile[Transfer]
        moves = moves.where((moves.end > start) & (moves.start < end) & (moves.block != NONE))
        uses = _Uses.of(profile)
        pieces = gaps.cut(np.concatenate((uses.met, uses.ready, moves.start, moves.end)))
        row = np.searchsorted(uses.met, pieces.start, side="right")
        some = row < len(uses.met)
        block = np.full(len(row), NONE, dtype=np.int64)
        block[some] = uses.block[row[some]]
        there = np.zeros(len(row), dtype=bool)
        there[some] = pieces.start[some] >= uses.ready[row[some]]
        cause = np.where(there, HOST, SPACE)
        cause[_moving(moves.where(moves.link == Link.H2D), pieces, block)] = LINK
        cause[_moving(moves.where(moves.link == Link.DISK_READ), pieces, block)] = DISK
        cause[~some] = OTHER
        return Bubble(pieces=pieces, cause=cause.astype(np.int64), block=block)

    def idle(self, start: int, end: int) -> Idle:
        """The sums over [start, end), which must lie inside the window."""
        return self.idles(np.array([start], dtype=np.int64), np.array([end], dtype=np.int64))[0]

    def idles(self, starts: Ints, ends: Ints) -> tuple[Idle, ...]:
        """The sums over several stretches of time."""
        columns = []
        for cause in range(len(CAUSES)):
            mask = self.cause == cause
            part = Intervals(start=self.pieces.start[mask], end=self.pieces.end[mask])
            columns.append((part.before(ends) - part.before(starts)).tolist())
        return tuple(Idle(**dict(zip(CAUSES, row, strict=True))) for row in zip(*columns, strict=True))

    def by_block(self, cause: int) -> dict[int, int]:
        """Nanoseconds charged to this cause (index into CAUSES), by block, most first."""
        mask = self.cause == cause
        blocks, row = np.unique(self.block[mask], return_inverse=True)
        sums = np.zeros(len(blocks), dtype=np.int64)
        np.add.at(sums, row, (self.pieces.end - self.pieces.start)[mask])
        order = np.argsort(-sums, kind="stable")
        return dict(zip(blocks[order].tolist(), sums[order].tolist(), strict=True))


def idle(profile: Profile, start: int, end: int) -> Idle:
    """Where the time without computing in [start, end) went. The causes sum to what C leaves of it, exactly."""
    return Bubble.of(profile, start, end).idle(start, end)


def idle_by_step(profile: Profile) -> tuple[tuple[int, Idle], ...]:
    """The same for every step that ended, with its id, in the order in which they began."""
    steps = ended(profile[Step])
    if not len(steps):
        return ()
    steps = steps.where(np.argsort(steps.start, kind="stable"))
    window = Window(start=int(steps.start.min()), end=int(steps.end.max()))
    found = Bubble.of(profile, window.start, window.end).idles(steps.start, steps.end)
    return tuple(zip(steps.id.tolist(), found, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Uses:
    """Uses in the order in which they were met."""

    met: Ints
    ready: Ints
    block: Ints

    @staticmethod
    def of(profile: Profile) -> _Uses:
        uses = profile[Use]
        met = np.maximum(uses.at, uses.ready)
        order = np.lexsort((uses.at, met))
        return _Uses(met=met[order], ready=uses.ready[order], block=uses.block[order])


def _moving(moves: Columns, pieces: Intervals, block: Ints) -> Mask:
    """In which pieces the block of the piece is being moved.

    All blocks are laid end to end on one line, a stretch of `width` for each, so that one union and one search answer
    for all of them. Ranks among the edges of the pieces stand for times: products of times would overflow.
    """
    edges = distinct(np.concatenate((pieces.start, pieces.end)))
    width = len(edges) + 1
    blocks = np.unique(moves.block)
    if not len(blocks) or not len(edges):
        return np.zeros(len(pieces), dtype=bool)
    offset = np.searchsorted(blocks, moves.block) * width
    # A transfer may begin and end outside the pieces: it then counts from the next edge to the edge before.
    first = np.searchsorted(edges, moves.start, side="left")
    last = np.searchsorted(edges, moves.end, side="left")
    covered = Intervals.union(offset + first, offset + last)
    row = np.minimum(np.searchsorted(blocks, block), len(blocks) - 1)
    known = blocks[row] == block
    result: Mask = known & covered.contains(row * width + np.searchsorted(edges, pieces.start))
    return result
