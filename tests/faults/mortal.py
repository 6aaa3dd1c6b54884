"""Death by number: a process that kills itself at its n-th operation on files, whoever in it does that operation.

The functions of `os` are replaced, since everything of penstock that touches a disk calls them there: the engine's
reads and writes, the store, locks, folders, metrics, tokens.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

WRITES: Final = ("pwrite", "pwritev", "write")
SYNCS: Final = ("fsync", "fdatasync")
OTHERS: Final = (
    *("open", "pread", "preadv", "rename", "replace", "link", "unlink"),
    *("mkdir", "rmdir", "ftruncate", "posix_fallocate"),
)
_write = os.write


class Mortal:
    """Counts operations, and dies at one of them: before it, after it, or in the middle of a write.

    Args:
        last: The number of that operation, from 1; 0 to live on.
    """

    def __init__(self, last: int) -> None:
        self.count = 0
        self._last = last
        self._lock = threading.Lock()
        self._draw = random.Random(last)

    def install(self) -> None:
        """Count from now on, for good."""
        for name in (*WRITES, *SYNCS, *OTHERS):
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                dies = self.count == self._last
            if dies:
                with suppress(OSError):
                    self._do_some(name, plain, args, options)
                os.kill(os.getpid(), signal.SIGKILL)
            if name in SYNCS:  # the page cache outlives the process
                return None
            return plain(*args, **options)

        return call

    def _do_some(self, name: str, plain: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Nothing of the operation, all of it, or of a write the beginning."""
        if name in WRITES:
            fd, data, *offset = args
            data = memoryview(b"".join(data) if name == "pwritev" else data).cast("B")
            part = data[: self._draw.randrange(len(data) + 1)]
            if name == "write":
                _write(fd, part)
            else:
                _buffered(fd, part, *offset)
        elif self._draw.random() < 0.5 and name not in SYNCS:
            plain(*args, **options)


def _buffered(fd: int, part: memoryview, offset: int) -> None:
    """Write a part of any length, also to a file that was opened for direct writes."""
    again = _open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    _pwrite(again, part, offset)


_open, _pwrite = os.open, os.pwrite


def say(*words: object) -> None:
    """A line for whoever listens, in one piece."""
    _write(1, (" ".join(map(str, words)) + "\n").encode())
