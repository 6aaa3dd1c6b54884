"""What a program has given back and glibc keeps: free chunks of its main heap that are still resident."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .pages import PAGE, resident_nbytes

SHARE: Final = {"light": 2000, "full": 500}
"""By level: looks may take one part in so many of the time. Each walks all free chunks, and pages of the heap."""
ALLOWANCE_NS: Final = 10_000_000
"""What looks may take beyond that: a program that grows deserves some at its start."""
NEAR: Final = 0.02
"""Readings this close to the highest may turn out to be where most is in use."""
MORE: Final = 0.005
"""By how much more there must be than at any look before, for another one to come first: memory grows page by page."""


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer. `uordblks` and `fordblks` are the bytes of chunks in use and of free
    ones in all heaps; what malloc has mapped on its own (`hblkhd`) is in neither."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class Heap:
    """The main heap of this process.

    Free chunks themselves cannot be asked for. But what is resident of the heap and not in use is free, so

        resident(heap) − in use  ≤  resident bytes of free chunks  ≤  bytes of free chunks

    The left side is what is told. It is too low by what is in use and was never touched, by what other threads' heaps
    use, and by what each thread sets aside for itself; it is not too high.
    """

    def __init__(self, start: int) -> None:
        library: Any = ctypes.CDLL(None, use_errno=True)
        self._mallinfo = library.mallinfo2
        self._mallinfo.restype = _MallocInfo
        self._sbrk = library.sbrk
        self._sbrk.restype, self._sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        self._mincore = library.mincore
        self._mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._start = start

    @classmethod
    def find(cls) -> Heap | None:
        """The heap, where the C library is a glibc that tells about it."""
        library = ctypes.CDLL(None)
        if not all(hasattr(library, name) for name in ("mallinfo2", "sbrk", "mincore")):
            return None
        try:
            maps = Path("/proc/self/maps").read_text()
        except OSError:
            return None
        starts = (int(line.split("-", 1)[0], 16) for line in maps.splitlines() if line.endswith("[heap]"))
        start = next(starts, None)
        return None if start is None else cls(start)

    def look(self) -> tuple[int, int]:
        """Resident bytes of the process, and how many of them are free at least.

        Both are of one instant as nearly as can be: what is in use is asked for before and after, and the larger
        answer counts, so that chunks that come or go in between are not told as free.

        Raises:
            OSError: the heap has shrunk meanwhile.
        """
        before = self._mallinfo()
        heap, resident = self._resident(), resident_nbytes()
        after = self._mallinfo()
        free = heap - max(before.uordblks, after.uordblks)
        return resident, max(0, min(free, before.fordblks, after.fordblks))

    def _resident(self) -> int:
        end = self._sbrk(0)
        pages = -(-(end - self._start) // PAGE)
        if pages <= 0:
            return 0
        flags = bytearray(pages)
        if self._mincore(self._start, pages * PAGE, (ctypes.c_char * pages).from_buffer(flags)):
            raise OSError(ctypes.get_errno(), "mincore")
        return flags.count(1) * PAGE


class HostMemory:
    """Resident memory, and what of it is free.

    Reading the first is cheap, and happens each time. The second is looked at where a peak may be: at readings within
    2 % of the highest, as long as looks take little time in all. Where more is resident than ever, or more of it is
    known, they may take twice that: an allocator that keeps much has readings near the highest all the time.

    Args:
        share: Looks may take one part in so many of the time.
        known: Bytes that have a name now.
        looked: Told of how many bytes are free, whenever that was looked at.
        clock: Nanoseconds since some instant.
        spent: Nanoseconds that a thread has worked. Waiting for Python's lock takes nothing from anybody.
    """

    def __init__(
        self,
        heap: Heap | None,
        *,
        share: int = SHARE["light"],
        known: Callable[[], int] = lambda: 0,
        looked: Callable[[int], None] = lambda freed: None,
        clock: Callable[[], int] = time.monotonic_ns,
        spent: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._heap = heap
        self._share = share
        self._known = known
        self._looked = looked
        self._clock, self._thread = clock, spent
        self._began = clock()
        self._spent = 0
        self._highest = 0
        self._most_known = 0
        self._freed: int | None = None

    def resident(self) -> int:
        """Resident bytes of the process."""
        self._freed = None
        found = resident_nbytes()
        if self._heap is None or not self._worth_a_look(found):
            return found
        began, known = self._thread(), self._known()
        try:
            resident, self._freed = self._heap.look()
            self._looked(self._freed)
        except OSError:
            return found
        finally:
            self._spent += self._thread() - began
        self._highest = max(self._highest, resident)
        self._most_known = max(self._most_known, known)
        return resident

    def _worth_a_look(self, found: int) -> bool:
        allowed = ALLOWANCE_NS + (self._clock() - self._began) // self._share
        if found < (1 - NEAR) * self._highest:
            return False
        more = found > (1 + MORE) * self._highest or self._known() > (1 + MORE) * self._most_known
        return (self._spent if more else 2 * self._spent) <= allowed

    def freed(self) -> int | None:
        """How many bytes of the last reading were free; None where that was not looked at."""
        return self._freed

    def in_use(self) -> int:
        """Resident bytes that are not known to be free, now."""
        if self._heap is not None:
            try:
                resident, freed = self._heap.look()
            except OSError:
                return resident_nbytes()
            return resident - freed
        return resident_nbytes()
