"""The executor's thread: an asyncio loop that runs the core, and the blocking calls that consumers make.

A block that is ready is leased under a plain lock. Only a consumer whose block is missing waits, and every wait has a
watchdog.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final, TypeVar

from ..memory.arena import Slot
from ..memory.errors import ClosedError, ForkError, StallError
from .core import Core
from .lease import Lease, Wish
from .mover import Event, Mover
from .tally import ExecutorStatistics

logger = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_S: Final = 10.0
STALL_S: Final = 120.0


class Executor:
    """Runs a core in a thread of its own.

    Args:
        stall_s: A wait during which no byte moved for so long is given up with `StallError`.
    """

    def __init__(self, core: Core, mover: Mover, *, watch_s: float = WATCH_S, stall_s: float = STALL_S) -> None:
        self.core = core
        self._mover = mover
        self._watch_s = watch_s
        self._stall_s = stall_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="penstock-executor", daemon=True)
        self._closed = False
        self._pid = os.getpid()

    def start(self) -> None:
        """Start the thread; prefetching begins at once."""
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self.core.attach(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def begin(self, root: Hashable) -> None:
        """A root call starts."""
        self.core.begin(root)

    def end(self, *, failed: bool) -> None:
        """A root call returned, or raised."""
        self.core.end(failed=failed)

    def acquire(self, block: int, *, observed: bool = True, backward: bool = False, counted: bool = True) -> Lease:
        """A lease on a block, waiting for it if it is not there. See `Core.acquire_nowait`.

        Raises:
            PenstockError: the block could not be brought (the reader's own error), the executor was closed, or nothing
                moved for too long.
        """
        self._check_process()
        got = self.core.acquire_nowait(block, observed=observed, backward=backward, counted=counted)
        return self._granted(got, block)

    def acquire_host(self, block: int) -> Lease:
        """A lease on the host's copy of a block that stays there, to compute with it on the CPU.

        It counts as no access of the device's: nothing is learned of the order, and nothing is copied.

        Raises:
            PenstockError: as `acquire`.
        """
        self._check_process()
        return self._granted(self.core.acquire_host_nowait(block), block)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkError(
                "a streamed model cannot be used in a forked child: its threads and its memory are not there. Load it "
                "in the child, or use the 'spawn' start method"
            )

    def _granted(self, got: Lease | Wish, block: int) -> Lease:
        if isinstance(got, Lease):
            return got
        try:
            return self._wait(got.granted, block)
        except BaseException:
            self.core.forget(got)
            raise

    def _wait(self, granted: Future[T], block: int) -> T:
        quiet_s, last = 0.0, self._mover.progress()
        while True:
            try:
                return granted.result(timeout=self._watch_s)
            except FutureTimeoutError:
                if granted.done():
                    return granted.result()
            now = self._mover.progress()
            quiet_s = 0.0 if now != last else quiet_s + self._watch_s
            last = now
            report = self.core.report()
            logger.warning("waiting for block %d; no byte moved for %.0f s; %s", block, quiet_s, report)
            if quiet_s >= self._stall_s:
                raise StallError(
                    f"gave up waiting for block {block}: no byte moved for {quiet_s:.0f} s ({report}); is the drive "
                    f"still there? If it is only slow, nothing is lost: run again"
                )

    def bring(
        self,
        places: Sequence[tuple[int, Slot]],
        gone: Sequence[int] = (),
        *,
        kept: Sequence[tuple[int, Slot]] = (),
        urgent: bool = True,
    ) -> list[int]:
        """Bring blocks into slots of the caller's own, and forget others there. See `Core.bring`."""
        self._check_process()
        return self.core.bring(places, gone, kept=kept, urgent=urgent)

    def let_go(self, blocks: Sequence[int]) -> list[int]:
        """Forget host copies that `bring` was to keep. See `Core.let_go`."""
        return self.core.let_go(blocks)

    def release(self, lease: Lease, event: Event = None) -> None:
        """Give a lease back; the slot may be refilled after `event`."""
        self.core.release(lease, event)

    def withdraw(self, block: int) -> None:
        """Wait until nobody has a block, and let nobody have it until `readmit`: its bytes are about to change.

        What it leaves is the copy that stays in host memory, where there is one; every other copy is dropped.

        Raises:
            ClosedError: the executor was closed.
            StallError: somebody kept it, and nothing moved, for too long.
        """
        self._check_process()
        self._wait(self.core.withdraw(block), block)

    def withdrawn(self, block: int) -> None:
        """Wait for a block that `core.withdraw` has been called for. Raises as `withdraw` does."""
        self._wait(self.core.leaving(block), block)

    def fail(self, error: Exception) -> None:
        """Nothing can be had any more: whoever waits, and whoever asks from now on, gets the error."""
        self.core.fail(error)

    def readmit(self, block: int) -> None:
        """Let a withdrawn block be used again; what was changed is in host memory and on disk."""
        self.core.readmit(block)

    def statistics(self) -> ExecutorStatistics:
        """A frozen record of the totals."""
        return self.core.statistics()

    def own_s(self) -> float:
        """Seconds of a processor that the executor's own thread has taken so far; it must be running."""
        assert self._thread.ident is not None, "not started"
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def close(self) -> None:
        """Stop: waiters get `ClosedError`, what is under way is cancelled, the thread ends. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if not self._thread.is_alive():
            if not self._loop.is_running():
                self._loop.close()
            return
        stopping = asyncio.run_coroutine_threadsafe(self.core.stop(ClosedError("the model was closed")), self._loop)
        stopping.result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
