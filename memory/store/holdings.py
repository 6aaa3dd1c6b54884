"""What an open store holds of the process: files, locks, a thread. And what becomes of it in a forked child."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from contextlib import suppress

from ..errors import ClosedError, DiskError, ForkError
from ..filelock import FileLock
from .datafiles import DataFiles
from .publisher import Publisher

logger = logging.getLogger(__name__)


class Holdings:
    """Let go of once, by `close` or by a finalizer: so it does not refer to the store's façade."""

    def __init__(self, publisher: Publisher, data: DataFiles, locks: tuple[FileLock, ...]) -> None:
        self.data = data
        self._publisher = publisher
        self._locks = locks
        self._pid = os.getpid()
        self._closed = False
        _all_of_process().add(self)

    def require(self) -> None:
        """Refuse what is closed or another process's.

        Raises:
            ClosedError: it was closed.
            ForkError: called in a forked child.
        """
        if os.getpid() != self._pid:
            raise ForkError(
                "a block store does not exist in a forked child; close it before forking, or open another there"
            )
        if self._closed:
            raise ClosedError("the block store was closed; open it again")

    def close(self) -> None:
        """End the thread, close the files, let go of the locks. A forked child does nothing."""
        if os.getpid() != self._pid or self._closed:
            return
        self._closed = True
        if self._publisher.slots.writing:
            logger.warning("closing a block store while %s is being written", self._publisher.describe_writing())
        self._publisher.close()
        self.data.close()
        for lock in self._locks:
            try:
                lock.release()
            except OSError as error:  # the drive went read-only: the file stays, and without its lock means nothing
                logger.warning("cannot remove %s: %s", lock.path, DiskError(error.strerror))
                with suppress(OSError):
                    lock.close()

    def forget(self) -> None:
        """In a forked child: keep no file open, since an open one would keep its lock after the parent's death."""
        if self._closed:  # the numbers of its files may be others' by now
            return
        self.data.close()
        for lock in self._locks:
            with suppress(OSError):
                lock.close()


@functools.cache
def _all_of_process() -> weakref.WeakSet[Holdings]:
    """What all open stores of this process hold."""
    known: weakref.WeakSet[Holdings] = weakref.WeakSet()
    os.register_at_fork(after_in_child=functools.partial(_forget_in_child, known))
    return known


def _forget_in_child(known: weakref.WeakSet[Holdings]) -> None:
    for holdings in list(known):
        holdings.forget()
    known.clear()
