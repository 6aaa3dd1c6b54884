"""One exact-size, page-aligned allocation, cut into slots.

An arena is made once, when a plan is carried out, and is never grown. It is cut front to back: a plan knows every slot
before the first byte is read, so there is no free list, no fragmentation and no rounding beyond the page.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from dataclasses import dataclass, field
from typing import Final

from .errors import ClosedError, ForkError

PAGE: Final = 4096
_libc: Final = ctypes.CDLL(None)
POISON: Final = 0xFF
"""Byte that fills freed slots in debug mode: every floating dtype reads 0xFF… as NaN."""


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """`nbytes` rounded up to a multiple."""
    return -(-nbytes // multiple) * multiple


def debug_enabled() -> bool:
    """Whether PENSTOCK_DEBUG asks for poisoned slots."""
    return os.environ.get("PENSTOCK_DEBUG", "") not in ("", "0")


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A place in an arena that holds one block."""

    arena: AnyArena
    offset: int
    """Bytes from the start of the arena; a multiple of the page."""
    nbytes: int
    stamp: int = -1
    """Id of the block whose bytes the slot holds; -1 while it is empty or being filled."""
    guard: object = None
    """Event that must have completed before the slot is filled again; it covers all earlier uses. None for no use."""

    def check_stamp(self, block: int) -> None:
        """Fail loudly if the slot does not hold `block` (our own bug, never the user's)."""
        assert self.stamp == block, f"slot at {self.offset} of {self.arena.tier} holds {self.stamp}, not {block}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaStatistics:
    """What an arena holds at this moment. All values in bytes."""

    tier: str
    nbytes: int
    cut_nbytes: int
    """Bytes handed out as slots."""
    slots: int


@dataclass(kw_only=True, eq=False)
class AnyArena:
    """What the arenas of every tier share: cutting slots and counting them. Holds no memory by itself."""

    tier: str
    nbytes: int
    _cut: int = field(default=0, init=False)
    _slots: int = field(default=0, init=False)

    def cut(self, nbytes: int) -> Slot:
        """Cut the next slot of at least `nbytes`, rounded up to the page."""
        size = round_up(nbytes)
        assert self._cut + size <= self.nbytes, f"plan overran its {self.tier} arena: {self._cut}+{size}>{self.nbytes}"
        slot = Slot(arena=self, offset=self._cut, nbytes=size)
        self._cut += size
        self._slots += 1
        return slot

    def poison(self, slot: Slot) -> None:
        """Overwrite a slot so that whoever still reads it gets NaN."""
        raise NotImplementedError

    def statistics(self) -> ArenaStatistics:
        """A frozen record of the arena's use."""
        return ArenaStatistics(tier=self.tier, nbytes=self.nbytes, cut_nbytes=self._cut, slots=self._slots)

    def close(self) -> None:
        """Give the memory back."""
        raise NotImplementedError


class HostArena(AnyArena):
    """Host memory from one anonymous mapping: exact, page-aligned, not inherited by forked children.

    Pages are taken when first touched. Transparent huge pages are asked for (fewer TLB misses in matrix-vector
    products, larger disk requests); they never reach beyond the mapping.
    """

    def __init__(self, nbytes: int, *, tier: str = "host") -> None:
        super().__init__(tier=tier, nbytes=round_up(max(nbytes, 1)))
        self._pid = os.getpid()
        self._map: mmap.mmap | None = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel built without transparent huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._map)
        """The whole arena, writable, one byte per item."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def view(self, offset: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` at `offset`.

        Raises:
            ClosedError: the arena was closed.
            ForkError: called in a forked child, where the mapping does not exist.
        """
        if self._map is None:
            raise ClosedError("the arena was closed; nothing may read or write it any more")
        if os.getpid() != self._pid:
            raise ForkError("arenas do not exist in a forked child; load the model in the child instead")
        return self.buffer[offset : offset + nbytes]

    def move(self, destination: int, source: int, nbytes: int) -> None:
        """Move bytes inside the arena (overlap allowed). Releases the GIL."""
        ctypes.memmove(self.address + destination, self.address + source, nbytes)

    def resident_nbytes(self) -> int:
        """Bytes whose pages have been touched so far."""
        if self._map is None:
            return 0
        pages = (ctypes.c_ubyte * (self.nbytes // PAGE))()
        if _libc.mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), pages):
            return self.nbytes
        return bytes(pages).count(1) * PAGE

    def allow_fork(self) -> None:
        """Let forked children inherit the pages from now on: right once nothing reads into them any more."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DOFORK)

    def poison(self, slot: Slot) -> None:
        """Overwrite a slot so that whoever still reads it gets NaN."""
        ctypes.memset(self.address + slot.offset, POISON, slot.nbytes)

    def close(self) -> None:
        """Give the memory back, or leave it to the last tensor that still views it."""
        self._map = None
        # Neither the mapping nor the buffer is closed by hand: torch.frombuffer keeps them alive but does not count as
        # an export, so that they could be closed under a tensor. They go with the last of those who refer to them.
        self.buffer = memoryview(b"")
