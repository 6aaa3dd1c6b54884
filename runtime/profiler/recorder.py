"""The recorder: what is recorded goes through it, and gets its numbers from it. No torch."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from .ring import Ring
from .schema import NONE, Block, Category, Mark, MarkKind, Memory, Module, Record, Step, Storage, Tables, Tier

logger = logging.getLogger(__name__)


class Recorder:
    """One recording: a ring of records, and tables that give them names.

    May be called from any thread. After a fork the child records nothing.

    Args:
        clock: Nanoseconds, monotonic.
    """

    def __init__(self, ring: Ring, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.tables: Tables = {"modules": {}, "blocks": {}, "storages": {}, "strings": {}}
        self.add: Callable[[Record], None] = ring.append
        """Record something."""
        self.alive = True
        """Whether this is the process that began the recording."""
        self.hooks = 0
        """How often the program was interrupted to record; times the cost of one, it is what the recording costs."""
        self.live = dict.fromkeys(Tier, 0)
        """Bytes of each tier that are accounted for now; a little off where threads meet."""
        self.on_step: list[Callable[[], bool]] = []
        """Called between two steps, and before the first; whether they took time, which is no step's."""
        self.taken: Callable[[int], None] = _nobody
        """Told of the address of every storage that gets a row of its own."""
        self._ring = ring
        self._lock = threading.Lock()
        self._strings: dict[str, int] = {}
        self._transfers = 0
        self._steps = 0
        self._open: tuple[int, int, int, int] | None = None
        """The step under way: index of its phase, start, tokens, root."""
        self._failed = False
        os.register_at_fork(after_in_child=functools.partial(_close_in_child, weakref.ref(self)))

    def close(self) -> None:
        """Record no more. Hooks that stay in graphs, and what is given back later, find nobody who listens."""
        self.add = _nothing

    def failed(self, error: Exception) -> None:
        """A hook went wrong, and the program goes on: said once, in the log and in the recording."""
        if self._failed:
            return
        self._failed = True
        logger.warning("the recording is incomplete: a hook failed with %s: %s", type(error).__name__, error)
        logger.debug("where it failed", exc_info=error)
        self.mark(MarkKind.ERROR, f"recorder: {type(error).__name__}: {error}")

    # --- numbers ----------------------------------------------------------------------------------------------------

    def string(self, text: str) -> int:
        """The number of a string."""
        with self._lock:
            number = self._strings.get(text)
            if number is None:
                number = self._strings[text] = len(self._strings)
                self.tables["strings"][number] = text
            return number

    def module(self, *, path: str, kind: str, parent: int = NONE, sampled: bool = False) -> int:
        """A new row of the module table."""
        return self._row("modules", Module(path=path, kind=kind, parent=parent, sampled=sampled))

    def block(self, *, name: str, nbytes: int, home: Tier, module: int) -> int:
        """A new row of the block table."""
        return self._row("blocks", Block(name=name, nbytes=nbytes, home=home, module=module))

    def storage(self, row: Storage) -> int:
        """A new row of the storage table."""
        return self._row("storages", row)

    def transfer_id(self) -> int:
        """A number for a transfer."""
        with self._lock:
            self._transfers += 1
            return self._transfers

    def _row(self, table: str, row: object) -> int:
        with self._lock:
            rows = self.tables[table]
            number = len(rows)
            rows[number] = row
            return number

    # --- records that several places make ---------------------------------------------------------------------------

    def memory(
        self,
        nbytes: int,
        tier: Tier,
        category: Category,
        *,
        module: int = NONE,
        storage: int = NONE,
        at: int = NONE,
        key: int = 0,
    ) -> None:
        """Bytes were taken, or given back where negative: now, or at an instant just before (`at`).

        `key` is the address of the storage that they are, where they are one.
        """
        if not nbytes:
            return
        if key:
            self.taken(key)
        self.live[tier] += nbytes
        at = self.clock() if at < 0 else at
        self.add(Memory(at=at, tier=tier, category=category, nbytes=nbytes, module=module, storage=storage))

    def named_on_host(self) -> int:
        """Bytes of the host that are accounted for now."""
        return self.live[Tier.HOST]

    def mark(self, kind: MarkKind, text: str = "", *, block: int = NONE, module: int = NONE) -> None:
        """Something happened."""
        number = self.string(text) if text else NONE
        self.add(Mark(at=self.clock(), kind=kind, block=block, module=module, text=number))

    def begin_step(self, phase: str, tokens: int = NONE, module: int = NONE) -> None:
        """A step starts now; the one under way ends."""
        now = self.clock()
        self.end_step(now)
        acted = [act() for act in self.on_step]  # all of them, whatever the first one says
        if any(acted):
            now = self.clock()
        self._open = (self.string(phase), now, tokens, module)

    def end_step(self, at: int | None = None) -> None:
        """The step under way ends, if there is one."""
        if self._open is None:
            return
        phase, start, tokens, module = self._open
        self._open = None
        end = self.clock() if at is None else at
        self.add(Step(id=self._steps, phase=phase, start=start, end=end, tokens=tokens, module=module))
        self._steps += 1

    def retitle(self, phase: str, tokens: int) -> None:
        """Say what the step under way turned out to be."""
        if self._open is not None:
            self._open = (self.string(phase), self._open[1], tokens, self._open[3])

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        return self._open is not None

    def lost(self) -> int:
        """Records dropped so far."""
        return self._ring.statistics().dropped


def _nothing(record: Record) -> None:
    """Where records go after the end."""


def _nobody(key: int) -> None:
    """Who wants to know of storages, where nobody does."""


def _close_in_child(recorder: weakref.ref[Recorder]) -> None:
    known = recorder()
    if known is not None:
        known.alive = False
        known.close()  # nobody would fetch what it records
