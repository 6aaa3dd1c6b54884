"""Which slot of a block holds what, and which may be written now. No I/O, no locks, no threads: only the rules.

A slot is **named** by the published manifest and by those on their way to be published. A named slot is never written:
whichever of these manifests is found after a power failure, all that it names must be there. So the first write after
a cut goes to the block's other slot and later ones overwrite that. While a cut is being published, both slots can be
named; then the next write has to wait until the publication is over and the older name is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .slotmap import SLOTS


@dataclass(kw_only=True, slots=True, eq=False)
class Copy:
    """One state of one block, in a slot."""

    slot: int
    checksum: int | None = None
    """None until the write has landed."""
    version: int = 0
    """Number of the commit that published it first; 0 while none has."""


@dataclass(kw_only=True, slots=True, eq=False)
class Cut:
    """The state of all blocks at one moment, to be published."""

    number: int
    metadata: bytes
    copies: tuple[Copy | None, ...]
    """One per block; None for a block that was never written."""
    unlanded: set[int]
    """Blocks whose writes had begun and have not ended yet."""


class Slots:
    """The slots of all blocks.

    Args:
        published: What the published manifest names, one per block.
    """

    def __init__(self, published: Sequence[Copy | None]) -> None:
        self.published = tuple(published)
        self.running = list(published)
        """The newest state of each block whose write has landed."""
        self.writing: dict[int, Copy] = {}
        """Blocks that are being written, and what they will be."""
        self.cuts: list[Cut] = []
        """Not yet published, oldest first."""

    def target(self, block: int) -> int | None:
        """The slot that a write may go to now; None while every slot is named."""
        copies = [self.published[block], *(cut.copies[block] for cut in self.cuts)]
        named = {copy.slot for copy in copies if copy is not None}
        running = self.running[block]
        # What is not committed is overwritten in place: the other slot may be the only committed one.
        free = [slot for slot in range(SLOTS) if slot not in named]
        if running is not None and running.slot in free:
            return running.slot
        return free[0] if free else None

    def begin(self, block: int) -> Copy:
        """Take the target for a write."""
        slot = self.target(block)
        assert slot is not None, block
        assert block not in self.writing, block
        copy = self.writing[block] = Copy(slot=slot)
        return copy

    def landed(self, block: int, checksum: int) -> None:
        """The write is over: this is the state of the block now."""
        copy = self.writing.pop(block)
        copy.checksum = checksum
        self.running[block] = copy
        for cut in self.cuts:
            if cut.copies[block] is copy:
                cut.unlanded.discard(block)

    def cut(self, number: int, metadata: bytes) -> Cut:
        """The state now, with writes that have begun as they will be, as the next to be published."""
        copies = tuple(self.writing.get(block, copy) for block, copy in enumerate(self.running))
        unlanded = set(self.writing)
        made = Cut(number=number, metadata=metadata, copies=copies, unlanded=unlanded)
        self.cuts.append(made)
        return made

    def publish(self, cut: Cut) -> None:
        """The oldest cut is the truth from now on."""
        assert cut is self.cuts[0], cut.number
        assert not cut.unlanded, cut.unlanded
        del self.cuts[0]
        for copy in cut.copies:
            if copy is not None and copy.version == 0:
                copy.version = cut.number
        self.published = cut.copies

    def drop(self, cut: Cut) -> None:
        """A cut will not be published; what only it names may be overwritten."""
        self.cuts.remove(cut)
