"""Who goes on while several members pass through the same blocks: one of them on the device, and one on the CPU.

A zig-zag schedule: every member uses a block before the next one is brought, so that a sweep over the model reads each
block once, however many members there are. A member runs until it wants a block that is not shared now; then the next
one runs that can. When nobody can, what is shared has been used by everybody and is let go; the wish for the block that
comes first is granted, to the member that ran last if it is its wish too.

Members need not want the same blocks: one may skip some, take others, or end early. Blocks are numbered in the order of
their definition, and the lowest number wanted comes first, so that members which differ meet again.

A member may have a part of the model computed by the CPU. It gives the device up meanwhile, and others go on there:
with two members or more both processors work. A part is lent to one processor at a time (`parts.py`). Who is away
comes back for blocks that others have used: these are kept for it, as many as there is room for. For more of them it is
waited for, but only while the CPU computes, so that somebody always goes on. Blocks that a member holds take room too,
while it is away or others go on in other ones.

Members may also meet: at a place where one of them does something for all who are there. A place has a number among
those of blocks, and is a wish like a block: it is granted when nobody can go on before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from .parts import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What happens next."""

    member: int | None
    """Who goes on on the device; None where somebody does already, or nobody can."""
    cpu: int | None = None
    """Who goes on on the CPU from now on."""
    release: tuple[int, ...] = ()
    """Blocks to give back first: all who wanted them have used them."""
    ends: bool = False
    """A sweep has ended."""
    begins: bool = False
    """A sweep over `root` begins."""
    root: Hashable = None
    admitted: tuple[int, ...] = ()
    """Who takes part in the sweep that begins."""


@dataclass(kw_only=True, slots=True)
class _Member:
    """Where one member stands. In none of these states it runs, or is to run."""

    root: Hashable = None
    """The root that it waits at the gate for, or is inside of."""
    arrived: int = -1
    """Its place in the queue at the gate; -1 where it does not wait there."""
    breadth: int = 0
    """Those that use more of the model go first."""
    inside: bool = False
    """Whether it takes part in the sweep under way and has not come to its end."""
    wish: int | None = None
    """The block that it waits for."""
    position: int = -1
    """How far it is in the sweep: the last block that it wanted, or of the last part that the CPU computed for it."""
    rests_until: int | None = None
    """The number of sweeps that must have ended before it goes on."""


class Turnstile:
    """The policy. Knows members, blocks and parts by number. Whoever calls it sees to it that no two do at once.

    Args:
        ahead: Blocks that may be kept for members that are away, or that they hold, besides those that one member holds
            at once.
    """

    def __init__(self, *, ahead: int = 0) -> None:
        self._ahead = ahead
        self._members: dict[int, _Member] = {}
        self._users: dict[int, Counter[int]] = {}
        """Blocks that are shared now: the calls under way that use each, by member."""
        self._brought: set[int] = set()
        """Blocks that were shared in this sweep."""
        self._meetings: set[int] = set()
        """Numbers that are places to meet at, and not blocks."""
        self._device: int | None = None
        """Who has the device, once that was decided here."""
        self._parts = Parts()
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

    def start(self) -> int | None:
        """Who is the first to run, on the device; None where there are no members."""
        self._device = min(self._members, default=None)
        return self._device

    def leave(self, member: int) -> None:
        """A member takes part no longer."""
        del self._members[member]
        self._parts.forget(member)

    def arrive(self, member: int, root: Hashable, *, breadth: int = 0) -> None:
        """A member wants to begin a call of `root`; it waits for the next sweep over it. Of those that begin together
        the ones of the greatest breadth go first: what they use is then the order of the sweep."""
        state = self._members[member]
        assert not state.inside, "root calls do not nest"
        self._arrivals += 1
        state.root, state.arrived, state.breadth = root, self._arrivals, breadth

    def finish(self, member: int) -> None:
        """A member's root call ended; it goes on outside."""
        self._members[member].inside = False

    def rest(self, member: int) -> None:
        """A member sits out until one more sweep has ended."""
        self._members[member].rests_until = self.ended + 1

    def wants(self, member: int, block: int) -> bool:
        """A member needs a block. Returns whether it is shared now; if not, the member waits for its turn to bring
        it."""
        state = self._members[member]
        state.position = block
        if block in self._users:
            return True
        state.wish = block
        return False

    def meets(self, member: int, place: int) -> None:
        """A member waits at a place for all who are still to come there in this sweep."""
        state = self._members[member]
        state.position = state.wish = place
        self._meetings.add(place)

    def met(self, place: int) -> None:
        """What was waited for there has been done for everybody who has come: they can go on."""
        for state in self._members.values():
            if state.wish == place:
                state.wish = None

    def shares(self, block: int) -> None:
        """A block was brought and is shared from now on."""
        assert block not in self._users, f"block {block} is shared already"
        self._users[block] = Counter()
        self._brought.add(block)

    def uses(self, member: int, block: int) -> None:
        """A call of a member begins to use a shared block."""
        self._users[block][member] += 1

    def used(self, member: int, block: int) -> None:
        """A call of a member has used a shared block."""
        users = self._users[block]
        assert users[member], f"block {block} was given back twice"
        users[member] -= 1
        if not users[member]:
            del users[member]

    # --- parts that the CPU computes for some members ---------------------------------------------------------------

    def crosses(self, member: int, part: Hashable, *, last_block: int) -> None:
        """The CPU is to compute a part for a member; it waits for its turn there, and gives the device up.

        Args:
            part: None for what both processors may compute at once.
            last_block: The highest number among the blocks of the part.
        """
        self._members[member].position = last_block
        self._parts.queue(member, part)

    def crossed(self, member: int) -> None:
        """The CPU has computed it, or failed; the member waits for the device."""
        self._parts.done(member)

    def enters(self, member: int, part: Hashable, *, first_block: int) -> bool:
        """A member is to compute a part on the device. Returns whether it may at once; if not, it waits for the CPU."""
        if self._parts.enters(member, part):
            return True
        self._members[member].position = first_block
        return False

    def left(self, part: Hashable) -> None:
        """A member has computed a part on the device."""
        self._parts.left(part)

    def on_cpu(self, member: int) -> bool:
        """Whether a member's turn is on the CPU."""
        return self._parts.computes == member

    # --- turns ------------------------------------------------------------------------------------------------------

    def turn(self, last: int | None) -> Turn:
        """Who goes on on either processor after something changed: `last` waits, rests, or has left; None where no
        member did, but a part was given back."""
        if self._device == last:
            self._device = None
        cpu = None if self.stopping else self._next_on_cpu()
        if self._device is not None:
            return Turn(member=None, cpu=cpu)
        turn = self._on_device(last, cpu)
        self._device = turn.member
        return turn

    def _next_on_cpu(self) -> int | None:
        """Who has the CPU from now on: of those whose part is not on the device, the one that is furthest behind."""
        return self._parts.begin(lambda member: self._members[member].position)

    def _on_device(self, last: int | None, cpu: int | None) -> Turn:
        if not self._members:
            ends, self._open = self._open, False
            self.ended += ends
            return Turn(member=None, release=self._let_go(), ends=ends)
        order = list(self._order_from(last))
        if self.stopping:
            here = [member for member in order if member != self._parts.computes]
            for member in here[:1]:
                self._parts.forget(member)
            return Turn(member=next(iter(here), None))
        ready = [member for member in order if self._is_ready(member)]
        if ready:
            return self._go(min(ready, key=lambda m: (self._members[m].position, -self._members[m].breadth)), cpu)
        wishing = [member for member in order if self._members[member].inside and self._wish(member) is not None]
        if wishing:
            return self._grant(wishing, cpu)
        if any(state.inside for state in self._members.values()):
            assert self._parts.computes is not None, "all wait, and nobody computes"
            return Turn(member=None, cpu=cpu)
        return self._between(order)

    def _is_ready(self, member: int) -> bool:
        """Whether a member waits for nothing, for a block that is shared, or for a part that the CPU has left."""
        state = self._members[member]
        if state.rests_until is not None or state.arrived >= 0 or self._parts.keeps(member):
            return False
        return state.wish is None or state.wish in self._users

    def _wish(self, member: int) -> int | None:
        return self._members[member].wish

    def _grant(self, wishing: Sequence[int], cpu: int | None) -> Turn:
        """Nobody can go on with what is shared: the lowest wish is granted, if there is room.

        Who holds blocks elsewhere is waited for while the CPU computes. Otherwise whoever was granted a block last, and
        holds it, has room, since the others hold no more than they did then: it goes on until it holds none.
        """
        wishes = sorted({wish for member in wishing if (wish := self._wish(member)) is not None})
        for wish in wishes:
            if wish in self._meetings and self._comes(wish):
                return Turn(member=None, cpu=cpu)
            member = self._granted_to(wish, wishing)
            kept = self._kept(wish)
            if kept is not None and len(kept) + self._held_by_others(member) <= self._ahead:
                return self._go(member, cpu, release=self._let_go(kept))
            if self._parts.computes is not None:
                return Turn(member=None, cpu=cpu)
        return self._go(self._granted_to(wishes[0], wishing), cpu, release=self._let_go())

    def _granted_to(self, wish: int, wishing: Sequence[int]) -> int:
        able = (member for member in wishing if self._wish(member) == wish)
        return max(able, key=lambda member: self._members[member].breadth)

    def _comes(self, place: int) -> bool:
        """Whether somebody who has the CPU, or waits for it while it computes, is still before a place."""
        before = any(self._members[member].position < place for member in self._parts.away)
        return before and self._parts.computes is not None

    def _held_by_others(self, member: int) -> int:
        """Blocks in use that this member does not hold itself."""
        return sum(bool(users) and member not in users for users in self._users.values())

    def _kept(self, wish: int) -> frozenset[int] | None:
        """Blocks that are not to be let go when a wish is granted, because somebody who waits for the CPU, or is there,
        comes to them later; None where those are to come back first."""
        if self._parts.computes is None:
            return frozenset()
        if any(self._members[member].position < wish for member in self._parts.entering):
            return None
        behind = min((self._members[member].position for member in self._parts.away), default=wish)
        wanted = {block for block in self._brought if behind < block < wish}
        kept = frozenset(block for block in wanted if block in self._users and not self._users[block])
        gone = any(block not in self._users for block in wanted)
        return None if gone or len(kept) > self._ahead else kept

    def _go(self, member: int, cpu: int | None, *, release: tuple[int, ...] = (), ends: bool = False) -> Turn:
        self._members[member].wish = None
        self._parts.goes_on(member)
        return Turn(member=member, cpu=cpu, release=release, ends=ends)

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
            return self._go(woken[0], None, release=release, ends=ends)
        assert at_gate, "every member waits, and none of them at the gate"
        root = self._members[min(at_gate, key=lambda member: self._members[member].arrived)].root
        admitted = [member for member in at_gate if self._members[member].root == root]
        for member in admitted:
            state = self._members[member]
            state.arrived, state.inside, state.position = -1, True, -1
        self._open = True
        self.begun += 1
        self._brought.clear()
        first = max(admitted, key=lambda member: self._members[member].breadth)
        return Turn(member=first, release=release, ends=ends, begins=True, root=root, admitted=tuple(sorted(admitted)))

    def _rested(self, state: _Member) -> bool:
        return state.rests_until is not None and state.rests_until <= self.ended

    def _let_go(self, kept: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """Stop sharing the blocks that no call under way uses, but for some."""
        idle = tuple(block for block, users in self._users.items() if not users and block not in kept)
        for block in idle:
            del self._users[block]
        return idle

    def _order_from(self, last: int | None) -> Iterator[int]:
        """All members in the order of their numbers, round from `last`."""
        members = sorted(self._members)
        first = -1 if last is None else last
        yield from (member for member in members if member >= first)
        yield from (member for member in members if member < first)
