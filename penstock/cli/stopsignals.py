"""SIGTERM and SIGINT as a wish to end, which is granted at the next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final

OK: Final = 0
INTERRUPTED: Final = 130
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes the two signals while it is entered; call it to learn whether one came. A second Ctrl-C ends at once.

    Only the main thread of a process may take signals: in another one nothing is taken.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that came."""
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether one came."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a process that was ended by it, in order, exits with."""
        return INTERRUPTED if self.signal is signal.SIGINT else OK

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._came) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
