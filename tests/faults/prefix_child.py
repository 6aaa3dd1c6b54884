"""A process that stores prompts until it is killed. Run as a script it forks such processes on demand."""

from __future__ import annotations

import os
import sys

from mortal import Mortal, say
from prefix_blocks import IDENTITY, TOKENS, capacity, prompt, put

from penstock.memory.prefix import PrefixStore

CAPACITY = capacity(6, 4)
STORED = (prompt(2, 1), prompt(3, 2))
"""What is there before."""


def later(number: int) -> list[int]:
    """What is stored then, one after another: the first goes on from what is there, the others need room."""
    return (STORED[1][: 3 * TOKENS] + prompt(1, 3), prompt(2, 4), prompt(3, 5))[number]


def live(folder: str, last: int) -> None:
    """Open the store and store three prompts. `last` is the operation on files to die at."""
    mortal = Mortal(last)
    mortal.install()
    with PrefixStore(folder) as store:
        say("opened")
        for number in range(3):
            report = put(store, later(number))
            assert not report.reason, report
            say("stored", number)


def serve() -> None:
    """Fork one process per line of input, "folder last"; say "end" and its status when it is gone."""
    for line in sys.stdin:
        folder, last = line.rsplit(maxsplit=1)
        pid = os.fork()
        if pid == 0:
            try:
                live(folder, int(last))
                os._exit(0)
            finally:
                os._exit(1)
        say("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    assert IDENTITY
    serve()
