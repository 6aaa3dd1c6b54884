"""The order in which blocks are used: learned per root call, predicted across calls.

A root call is the outermost call into a streamed model: one forward of the decoder, of the encoder, of a draft. Each
root keeps a few variants of its order (the first decoder call of an encoder–decoder projects the cross-attention keys,
later ones do not), and each finished call remembers which one followed it, so that prefetching runs on across the
token boundary. A wrong guess costs time, never correctness.

A backward pass calls no root; what it uses behind a call is taken for one. So after a forward the blocks of its
backward are expected, and after those the forward of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final


@dataclass(frozen=True, slots=True)
class Backward:
    """What a backward pass uses behind a root call, as a root of its own: nobody says where it begins and ends."""

    after: Hashable
    """The root call."""


Order = tuple[int, ...]
Call = tuple[Hashable, Order]

MAX_VARIANTS: Final = 8
MAX_CYCLE: Final = 4
"""Calls in a cycle that is recognised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderStatistics:
    """Totals since the model was made."""

    calls: int
    matched: int
    """Accesses that came as predicted."""
    mismatched: int
    relearned: int
    """Calls that ended with an order not known before."""


class AccessOrders:
    """Learns and predicts access orders. Not thread-safe: the executor guards it.

    Args:
        guess: The order to expect of a root that has not run yet (definition order of its blocks).
        first: The root that is expected to be called first; None when unknown.
    """

    def __init__(self, guess: Callable[[Hashable], Order], *, first: Hashable | None = None) -> None:
        self._guess = guess
        self._variants: dict[Hashable, list[Order]] = {}
        self._follows: dict[Call, Call] = {}
        self._last: Call | None = None
        self._expected: Call | None = None if first is None else (first, guess(first))
        self._root: Hashable | None = None
        self._order: Order = ()
        self._position = 0
        self._seen: list[int] = []
        self._calls = self._matched = self._mismatched = self._relearned = 0

    def begin(self, root: Hashable) -> None:
        """A root call starts."""
        assert self._root is None, "root calls do not nest"
        self._root = root
        self._position = 0
        self._seen = []
        if self._expected is not None and self._expected[0] == root:
            self._order = self._expected[1]
        else:
            known = self._variants.get(root)
            self._order = known[-1] if known else self._guessed(root)

    def _guessed(self, root: Hashable) -> Order:
        """What to expect of a root that has not run: of a backward pass, what was used before it, from behind."""
        if not isinstance(root, Backward):
            return self._guess(root)
        return () if self._last is None else self._last[1][::-1]

    def begin_backward(self) -> bool:
        """A backward pass uses a block. Between two root calls such uses have an order of their own, which ends when
        the next call begins; within one nothing is learned from them. Returns which it is."""
        if self._root is None and self._last is not None:
            last = self._last[0]
            self.begin(Backward(last.after if isinstance(last, Backward) else last))
        return self.in_backward

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass is under way, for all that is known."""
        return isinstance(self._root, Backward)

    def observe(self, block: int) -> bool:
        """A block is used. Returns whether it is the one that was predicted."""
        self._seen.append(block)
        if self._position < len(self._order) and self._order[self._position] == block:
            self._position += 1
            self._matched += 1
            return True
        self._mismatched += 1
        length = len(self._seen)
        seen = tuple(self._seen)
        for variant in reversed(self._variants.get(self._root, [])):
            if variant[:length] == seen:
                self._order, self._position = variant, length
                return False
        if block in self._order[self._position :]:
            self._position = self._order.index(block, self._position) + 1
        return False

    def end(self) -> bool:
        """The root call returned. Returns whether its order was new and has been learned."""
        assert self._root is not None, "end() without begin()"
        call = (self._root, tuple(self._seen))
        variants = self._variants.setdefault(self._root, [])
        new = call[1] not in variants
        if not new:
            variants.remove(call[1])
        variants.append(call[1])
        if len(variants) > MAX_VARIANTS:
            forgotten = (self._root, variants.pop(0))
            self._follows.pop(forgotten, None)
        if self._last is not None:
            self._follows[self._last] = call
        surprise = new and call[1] != self._order
        self._calls += 1
        self._relearned += surprise
        self._last = call
        self._expected = self._successor(call)
        self._root, self._order, self._position = None, (), 0
        return surprise

    def abort(self) -> None:
        """The root call raised: what it used so far teaches nothing."""
        self._root, self._order, self._position = None, (), 0

    def upcoming(self, limit: int) -> Iterator[int]:
        """The next `limit` accesses as predicted from here, on across the ends of calls."""
        return islice(self._forever(), limit)

    def _forever(self) -> Iterator[int]:
        if self._root is not None:
            yield from self._order[self._position :]
            call: Call | None = self._successor((self._root, self._order))
        else:
            call = self._expected
        while call is not None and call[1]:
            yield from call[1]
            call = self._successor(call)

    def steady(self) -> Order | None:
        """The order of the calls that repeat: the last one, and what follows it until it comes again; None if it did
        not. Decoding is a cycle of one call, a model whose parts are called in turn one of several."""
        if self._last is None:
            return None
        call = self._last
        order: Order = ()
        for _ in range(MAX_CYCLE):
            follower = self._follows.get(call)
            if follower is None:
                return None
            order += follower[1]
            if follower == self._last:
                return order
            call = follower
        return None

    def _successor(self, call: Call) -> Call:
        """What follows a call: what followed it last time, else the same again (decoding)."""
        return self._follows.get(call, call)

    def statistics(self) -> OrderStatistics:
        """A frozen record of the totals."""
        return OrderStatistics(
            calls=self._calls, matched=self._matched, mismatched=self._mismatched, relearned=self._relearned
        )
