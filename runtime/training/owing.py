"""Experts without tokens: their updates are owed, and made before anybody uses them.

An expert of a parameter that holds several has a gradient of zero where no token went to it, and an optimizer changes
it all the same. So its shards are left on disk, and what they owe is made when a router asks for it again, or when
masters are to be current: before a commit, and before anybody looks at the weights otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...kernels.zeros import all_zero
from ...scheduler.owed import MOST, Idleness, OwedUpdate, OwedUpdates, worth_owing
from .blockchanges import Step
from .intake import Gradient, SpilledGradient
from .shards import SMALL, Piece, Shard
from .spill import GradientSpill
from .trained import Trained

Owed = Mapping[int, tuple[OwedUpdate, ...]]
"""By shard: updates that come before any other."""


class Home(Protocol):
    """What is to be known of where weights lie."""

    def changes_lent(self, block: int) -> bool:
        """Whether a block may change while it is lent."""

    def moving_nbytes(self, block: int) -> int:
        """What a block takes on disk; 0 where it stays in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Todo:
    """What a step does about a block."""

    shards: Sequence[int]
    """That are changed now."""
    owed: Owed = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwingStatistics:
    """What experts without tokens have spared, in updates of a shard."""

    left: int
    """Updates that were not made in their step."""
    made: int
    """Of these, those that have been made since, or are on their way."""
    caught_up: int
    """Times that a shard was read, changed and written for that alone."""

    @property
    def waiting(self) -> int:
        """Updates that are owed."""
        return self.left - self.made


class Owing:
    """Which shards owe updates.

    Args:
        trained: In their order.
        shards: Of these.
        moving: The numbers of those that do not stay in host memory: others are not worth leaving out.
        arrays: Of a shard.
        home: Where weights lie.
        spill: Where gradients are that have gone to disk.
    """

    def __init__(
        self,
        *,
        trained: Sequence[Trained],
        shards: Sequence[Shard],
        moving: Collection[int],
        arrays: int,
        home: Home,
        spill: GradientSpill | None,
    ) -> None:
        self._arrays, self._home, self._spill = arrays, home, spill
        self._pieces = {
            shard.id: shard.pieces[0]
            for shard in shards
            if shard.id in moving and shard.block != SMALL and home.changes_lent(shard.block)
            if len(shard.pieces) == 1 and trained[shard.pieces[0].parameter].experts
        }
        self._each = {
            piece.parameter: trained[piece.parameter].elements // trained[piece.parameter].experts
            for piece in self._pieces.values()
        }
        """Elements of an expert, by parameter."""
        self._sizes = {shard.id: shard.array_nbytes for shard in shards}
        self._blocks = {piece.parameter: shards[number].block for number, piece in self._pieces.items()}
        self._ledger = OwedUpdates({number: piece.parameter for number, piece in self._pieces.items()})
        self._idleness = {block: Idleness() for block in self._blocks.values()}
        self._lock = threading.Lock()
        self._left = self._made = self._caught_up = 0

    @property
    def parameters(self) -> dict[int, int]:
        """Those that may owe, and the block of each."""
        return dict(self._blocks)

    def choose(self, step: Step, block: int, shards: Sequence[int]) -> Todo:
        """What a step does about the shards of a block that have a gradient: the others owe it from now on."""
        here = [p for p, home in self._blocks.items() if home == block and step.gradients[p] is not None]
        if not here:
            return Todo(shards=shards)
        with self._lock:
            for parameter in here:
                update = OwedUpdate(hyper=step.hypers[parameter], count=step.counts[parameter])
                self._ledger.step(parameter, update)
            idle = {number for number in shards if self._is_idle(number, step)}
            again = self._idleness[block].step(idle)
            idle = {number for number in idle if self._ledger.owed(number) <= MOST}  # with this one
            spared = sum(2 * self._arrays * self._sizes[number] for number in idle)
            weights = self._home.moving_nbytes(block)
            if not worth_owing(spared_nbytes=spared, again=again, weights_nbytes=weights):
                idle = set()
            now = [number for number in shards if number not in idle]
            owed = {number: self._ledger.settle(number)[:-1] for number in now if number in self._ledger}
            self._left += len(idle)
            self._made += sum(len(each) for each in owed.values())
        return Todo(shards=now, owed=owed)

    def _is_idle(self, number: int, step: Step) -> bool:
        """Whether a shard that may owe has a gradient of zero."""
        if number not in self._ledger:
            return False
        piece = self._pieces[number]
        return self._is_zero(piece, step.gradients[piece.parameter])

    def _is_zero(self, piece: Piece, gradient: Gradient | None) -> bool:
        if isinstance(gradient, SpilledGradient):
            assert self._spill is not None
            return self._spill.is_zero(piece)
        assert gradient is not None
        return all_zero(gradient[piece.start : piece.stop])

    def behind(self, parameter: int) -> bool:
        """Whether shards of a parameter owe."""
        with self._lock:
            return bool(self._ledger.owing(parameter))

    def settle(self, block: int, experts: Mapping[int, Collection[int]] | None = None) -> Owed:
        """What shards of a block owe, which is made now.

        Args:
            block: The block.
            experts: By parameter, experts that somebody needs; None for all.
        """
        with self._lock:
            found = {
                number: self._ledger.settle(number)
                for parameter, home in self._blocks.items()
                if home == block
                for number in self._ledger.owing(parameter)
                if experts is None or self._holds(number, experts.get(parameter, ()))
            }
            self._made += sum(len(each) for each in found.values())
            self._caught_up += len(found)
        return found

    def _holds(self, number: int, experts: Collection[int]) -> bool:
        """Whether a shard has elements of one of these experts."""
        piece = self._pieces[number]
        each = self._each[piece.parameter]
        return any(expert in experts for expert in range(piece.start // each, -(-piece.stop // each)))

    def statistics(self) -> OwingStatistics:
        """So far."""
        with self._lock:
            return OwingStatistics(left=self._left, made=self._made, caught_up=self._caught_up)
