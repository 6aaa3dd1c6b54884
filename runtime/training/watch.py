"""Waits of a training: each says what it waits for while it lasts, and is given up when nothing moves any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from ...memory.errors import ClosedError, StallError
from ...memory.transfer import Transfer

logger = logging.getLogger(__name__)

WATCH_S: Final = 10.0
STALL_S: Final = 120.0


class Watch:
    """Watches waits for a drive.

    Args:
        progress: A counter that grows while anything moves.
        watch_s: How often a wait is reported.
        stall_s: How long it may last without any progress.
    """

    def __init__(self, progress: Callable[[], int], *, watch_s: float = WATCH_S, stall_s: float = STALL_S) -> None:
        self._progress = progress
        self._watch_s = watch_s
        self._stall_s = stall_s

    def wait(self, once: Callable[[float], object], what: Callable[[], str]) -> None:
        """Wait until it is over.

        Args:
            once: Waits for so many seconds, and says whether it is over. Its errors are raised.
            what: Who waits for what.

        Raises:
            StallError: nothing moved for too long.
        """
        quiet_s, last = 0.0, self._progress()
        while not once(self._watch_s):
            now = self._progress()
            quiet_s = 0.0 if now != last else quiet_s + self._watch_s
            last = now
            logger.warning("%s; nothing moved for %.0f s", what(), quiet_s)
            if quiet_s >= self._stall_s:
                raise StallError(
                    f"gave up: {what()}; nothing moved for {quiet_s:.0f} s. Is the drive still there? What was "
                    "committed is not lost: penstock.close(model), then go on with penstock.resume(folder)"
                )

    def transfer(self, transfer: Transfer, what: Callable[[], str]) -> None:
        """Wait until a drive is done.

        Raises:
            DiskError: it failed.
            ClosedError: it was told to stop before.
            StallError: as `wait`.
        """
        self.wait(transfer.wait, what)
        failure = failure_of(transfer)
        if failure is not None:
            raise failure


def failure_of(done: Transfer) -> Exception | None:
    """Why the bytes of a request that is over are not where they should be; None where they are.

    One that was cancelled has no error, and some of its bytes.
    """
    if done.error is None and done.cancelled:
        return ClosedError("the model was closed while an update was reading or writing")
    return done.error
