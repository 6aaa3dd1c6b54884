"""PENSTOCK_PROFILE=run.prof: a recording that nobody had to write into a program."""

from __future__ import annotations

import atexit
import os

from .registry import process_registry


def start_if_asked() -> None:
    """Start the recording that PENSTOCK_PROFILE names; it ends with the process. The first model that streams calls it.

    Raises:
        UsageError: the file is there already.
    """
    path = os.environ.get("PENSTOCK_PROFILE", "")
    if not path:
        return
    del os.environ["PENSTOCK_PROFILE"]  # not for the processes that this one starts: they would fight for the file
    if process_registry().recording:
        return
    from .profiler import Profiler  # everything that reads and writes profiles: not for runs that want none

    profiler = Profiler(path)
    profiler.__enter__()
    atexit.register(profiler.__exit__, None, None, None)
