"""The disk tier of one layer: a file of slots, written once each, read in runs of slots that follow each other."""

from __future__ import annotations

from ...memory.disk import DiskEngine
from ...memory.errors import ClosedError
from ...memory.image import Window
from ...memory.transfer import Transfer


class SpillFile:
    """Slots of one layer in a file of a scratch folder.

    Args:
        engine: Reads and writes.
        path: Made when the first slot is written.
        slot_nbytes: Whole pages.
    """

    def __init__(self, engine: DiskEngine, path: str, slot_nbytes: int) -> None:
        self.path = path
        self._engine = engine
        self._slot_nbytes = slot_nbytes

    def write(self, slot: int, data: memoryview) -> Transfer:
        """Write a slot. What is read from `data` must not change until it is done."""
        return self._engine.write(self.path, slot * self._slot_nbytes, data)

    def read(self, first: int, count: int, into: memoryview, *, urgent: bool = False) -> Transfer:
        """Read slots that follow each other to the beginning of `into`."""
        nbytes = count * self._slot_nbytes
        window = Window(
            path=self.path,
            file_offset=first * self._slot_nbytes,
            nbytes=nbytes,
            needed_nbytes=nbytes,
            offset=0,
            data_offset=0,
            final_offset=0,
            data_nbytes=nbytes,
            skew=0,
        )
        return self._engine.read((window,), (), into, urgent=urgent)


def arrive(transfer: Transfer) -> None:
    """Wait until what was read is there.

    Raises:
        ClosedError: it never will be: the cache was closed meanwhile, which cancels what waits for a drive.
        DiskError: it could not be read.
    """
    transfer.wait()
    if transfer.cancelled:
        raise ClosedError("the cache of keys and values was closed while it was read; make a new one")
