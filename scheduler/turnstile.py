"""Who goes on while several members pass through the same blocks, one of them at a time.

A zig-zag schedule: every member uses a block before the next one is brought, so that a sweep over the model reads each
block once, however many members there are. A member runs until it wants a block that is not shared now; then the next
one runs that can. When nobody can, what is shared has been used by everybody and is let go; the wish for the block that
comes first is granted, to the member that ran last if it is its wish too.

Members need not want the same blocks: one may skip some, take others, or end early. Blocks are numbered in the order of
their definition, and the lowest number wanted comes first, so that members which differ meet again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What happens next."""

    member: int | None
    """Who goes on; None when nobody is left."""
    release: tuple[int, ...] = ()
    """Blocks to give back first: all who wanted them have used them."""
    ends: bool = False
    """A sweep has ended."""
    begins: bool = False
    """A sweep over `root` begins."""
    root: Hashable = None


@dataclass(kw_only=True, slots=True)
class _Member:
    """Where one member stands. In none of these states it runs, or is to run."""

    root: Hashable = None
    """The root that it waits at the gate for, or is inside of."""
    arrived: int = -1
    """Its place in the queue at the gate; -1 where it does not wait there."""
    inside: bool = False
    """Whether it takes part in the sweep under way and has not come to its end."""
    wish: int | None = None
    """The block that it waits for."""
    rests_until: int | None = None
    """The number of sweeps that must have ended before it goes on."""


class Turnstile:
    """The policy. Knows members and blocks by number; called by the member whose turn it is, and by nobody else."""

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._users: dict[int, int] = {}
        """Blocks that are shared now: how many calls under way use each."""
        self._open = False
        self._arrivals = 0
        self.begun = 0
        """Sweeps that have begun."""
        self.ended = 0
        self.stopping = False
        """Whether members only have to leave, each in its turn, whatever they wait for."""

    def join(self, member: int) -> None:
        """A member takes part from now on; it is to run."""
        assert member not in self._members, f"member {member} joined twice"
        self._members[member] = _Member()

    def leave(self, member: int) -> None:
        """A member takes part no longer."""
        del self._members[member]

    def arrive(self, member: int, root: Hashable) -> None:
        """A member wants to begin a call of `root`; it waits for the next sweep over it."""
        state = self._members[member]
        assert not state.inside, "root calls do not nest"
        self._arrivals += 1
        state.root, state.arrived = root, self._arrivals

    def finish(self, member: int) -> None:
        """A member's root call ended; it goes on outside."""
        self._members[member].inside = False

    def rest(self, member: int) -> None:
        """A member sits out until one more sweep has ended."""
        self._members[member].rests_until = self.ended + 1

    def wants(self, member: int, block: int) -> bool:
        """A member needs a block. Returns whether it is shared now; if not, the member waits for its turn to bring
        it."""
        if block in self._users:
            return True
        self._members[member].wish = block
        return False

    def shares(self, block: int) -> None:
        """A block was brought and is shared from now on."""
        assert block not in self._users, f"block {block} is shared already"
        self._users[block] = 0

    def uses(self, block: int) -> None:
        """A call begins to use a shared block."""
        self._users[block] += 1

    def used(self, block: int) -> None:
        """A call has used a shared block."""
        self._users[block] -= 1
        assert self._users[block] >= 0, f"block {block} was given back twice"

    def turn(self, last: int) -> Turn:
        """Who goes on after `last`, which waits, rests, or has left."""
        if not self._members:
            ends, self._open = self._open, False
            self.ended += ends
            return Turn(member=None, release=self._let_go(), ends=ends)
        order = list(self._order_from(last))
        if self.stopping:
            return Turn(member=order[0])
        ready = next((member for member in order if self._is_ready(self._members[member])), None)
        if ready is not None:
            return self._go(ready)
        wishes = [state.wish for state in self._members.values() if state.inside and state.wish is not None]
        if wishes:
            first = min(wishes)
            release = self._let_go()
            return self._go(next(m for m in order if self._members[m].wish == first), release=release)
        return self._between(order)

    def _is_ready(self, state: _Member) -> bool:
        """Whether a member waits for nothing, or for a block that is shared."""
        if state.rests_until is not None or state.arrived >= 0:
            return False
        return state.wish is None or state.wish in self._users

    def _go(self, member: int, *, release: tuple[int, ...] = (), ends: bool = False) -> Turn:
        self._members[member].wish = None
        return Turn(member=member, release=release, ends=ends)

    def _between(self, order: list[int]) -> Turn:
        """Nobody is inside: the sweep is over, and the next one begins."""
        ends, release = self._open, self._let_go()
        self._open = False
        self.ended += ends
        at_gate = [member for member in order if self._members[member].arrived >= 0]
        resting = [m for m in order if self._members[m].rests_until is not None]
        woken = [m for m in resting if not at_gate or self._rested(self._members[m])]
        if woken:
            for member in woken:
                self._members[member].rests_until = None
            return self._go(woken[0], release=release, ends=ends)
        assert at_gate, "every member waits, and none of them at the gate"
        root = self._members[min(at_gate, key=lambda member: self._members[member].arrived)].root
        admitted = [member for member in at_gate if self._members[member].root == root]
        for member in admitted:
            self._members[member].arrived, self._members[member].inside = -1, True
        self._open = True
        self.begun += 1
        return Turn(member=admitted[0], release=release, ends=ends, begins=True, root=root)

    def _rested(self, state: _Member) -> bool:
        return state.rests_until is not None and state.rests_until <= self.ended

    def _let_go(self) -> tuple[int, ...]:
        """Stop sharing the blocks that no call under way uses."""
        idle = tuple(block for block, users in self._users.items() if not users)
        for block in idle:
            del self._users[block]
        return idle

    def _order_from(self, last: int) -> Iterator[int]:
        """All members in the order of their numbers, round from `last`."""
        members = sorted(self._members)
        yield from (member for member in members if member >= last)
        yield from (member for member in members if member < last)
