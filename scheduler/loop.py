"""The asyncio loop that a core lives in: looks again when it is roused, and runs what is under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class Loop:
    """Rouses the core from any thread, and keeps its tasks.

    Args:
        look: Called in the loop, once however often it is roused before.
        failed: Told in the loop of a task that raised: a bug of ours.
    """

    def __init__(self, look: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self._look = look
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._roused = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run in this loop, which is the calling thread's, from now on."""
        self._loop = loop
        self._thread = threading.get_ident()
        self.rouse()

    def rouse(self) -> None:
        """Have the core look again."""
        if self._roused or self._loop is None:
            return
        self._roused = True
        try:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._run)  # without the system calls that rouse a loop from outside
            else:
                self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:  # the loop was closed meanwhile: `Core.stop` has told every waiter
            self._roused = False

    def _run(self) -> None:
        self._roused = False
        self._look()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task (called in the loop)."""
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)

    async def cancel(self) -> None:
        """Cancel everything under way, and wait for its end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
