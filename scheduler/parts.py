"""Parts of a model that either processor may compute, one of them at a time: who waits for the CPU, and who has it.

Weights are lent to their parameters from one tier. So the CPU begins a part when nobody is inside of it on the device,
and who would enter it there waits until the CPU has left. Who waits so goes first: others are not begun on the CPU
meanwhile, or the device would wait for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Set


class Parts:
    """The bookkeeping. Knows members and parts by number or name."""

    def __init__(self) -> None:
        self.computes: int | None = None
        """Who has the CPU."""
        self._away: dict[int, Hashable] = {}
        """The part of each member that waits for the CPU or has it, in the order in which they came."""
        self._entering: dict[int, Hashable] = {}
        """The part that each waits to enter on the device."""
        self._inside: Counter[Hashable] = Counter()
        """How many are inside of each part on the device."""

    @property
    def away(self) -> Set[int]:
        """Who waits for the CPU, or has it."""
        return self._away.keys()

    @property
    def entering(self) -> Set[int]:
        """Who waits for the CPU to leave a part."""
        return self._entering.keys()

    def queue(self, member: int, part: Hashable) -> None:
        """A member waits for the CPU; None is a part that both may compute at once."""
        assert member not in self._away, f"member {member} waits for the CPU twice"
        self._away[member] = part

    def begin(self, position: Callable[[int], int]) -> int | None:
        """Who has the CPU from now on, where it is free and somebody may; the one of the lowest position."""
        if self.computes is not None:
            return None
        waited_for = set(self._entering.values())
        able = [member for member, part in self._away.items() if not self._inside[part] and part not in waited_for]
        self.computes = min(able, key=position, default=None)
        return self.computes

    def done(self, member: int) -> None:
        """A member has left the CPU."""
        assert self.computes == member, f"member {member} does not have the CPU"
        self.computes = None
        del self._away[member]

    def enters(self, member: int, part: Hashable) -> bool:
        """Whether a member may enter a part on the device at once; it does if so, and waits if not."""
        if self.computes is not None and self._away[self.computes] == part:
            self._entering[member] = part
            return False
        self._inside[part] += 1
        return True

    def left(self, part: Hashable) -> None:
        """A member has left a part on the device."""
        self._inside[part] -= 1
        assert self._inside[part] >= 0, f"{part} was left twice"

    def keeps(self, member: int) -> bool:
        """Whether a member waits for the CPU in either way, or has it."""
        if member in self._away:
            return True
        part = self._entering.get(member)
        return part is not None and self.computes is not None and self._away[self.computes] == part

    def goes_on(self, member: int) -> None:
        """A member goes on on the device: what it waited to enter is entered."""
        part = self._entering.pop(member, None)
        if part is not None:
            self._inside[part] += 1

    def forget(self, member: int) -> None:
        """A member gives up what it waited for."""
        self._away.pop(member, None)
        self._entering.pop(member, None)
        if self.computes == member:
            self.computes = None
