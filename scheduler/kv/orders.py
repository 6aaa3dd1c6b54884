"""Which blocks leave a tier first."""

from __future__ import annotations

from collections.abc import Callable

from .table import BlockTable


class Cyclic:
    """For exact attention: what is used last from now on goes first (Belady), since layers take turns for ever.

    All blocks of a group are used together. The group that was just used comes again after all others, and of blocks
    of one group the last ones are read last. Under such a scan the least recently used block is always the next one to
    be needed, so that rule would hit nothing; here a fixed part stays.
    """

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self.now = 0
        """Number of the group that is being used, or was used last."""

    def farness(self, block: int) -> tuple[int, ...]:
        """See `Tiers.make_room`."""
        record = self._table.block(block)
        groups = len(self._table.shape.groups)
        return ((record.group - self.now - 1) % groups, record.index)


class Recent:
    """For policies that choose blocks: what was chosen longest ago goes first. Choices repeat from token to token."""

    def __init__(self) -> None:
        self._ticks: dict[int, int] = {}
        self._now = 0

    def used(self, block: int) -> None:
        """It was chosen, just now."""
        self._now += 1
        self._ticks[block] = self._now

    def forget(self, alive: Callable[[int], bool]) -> None:
        """Leave out blocks that are gone."""
        self._ticks = {block: tick for block, tick in self._ticks.items() if alive(block)}

    def farness(self, block: int) -> tuple[int, ...]:
        """See `Tiers.make_room`."""
        return (self._now - self._ticks.get(block, 0),)
