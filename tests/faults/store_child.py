"""A process that writes and commits until it is killed. Run as a script it forks such processes on demand.

What each commit holds follows from its number alone, so that whoever finds the store knows what must be in it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from penstock.memory.store import BlockSpec, BlockStore, Commit, SystemFiles

LIFE_S = 30.0
"""Nobody lives longer, should the killer die first."""
SIZES = (700, 4096, 9000, 40000)
SPECS = [BlockSpec(name=str(nbytes), kind="", nbytes=nbytes) for nbytes in SIZES]


def changed(number: int) -> list[int]:
    """The blocks that are written between commits `number` - 1 and `number`."""
    draw = random.Random(number)
    return draw.sample(range(len(SIZES)), draw.randint(1, len(SIZES)))


def value(block: int, number: int) -> bytes:
    """What commit `number` wrote to a block."""
    return random.Random(f"{block} {number}").randbytes(SIZES[block])


def state(number: int) -> dict[int, bytes]:
    """What commit `number` holds."""
    newest: dict[int, int] = {}
    for before in range(1, number + 1):
        newest.update(dict.fromkeys(changed(before), before))
    return {block: value(block, before) for block, before in newest.items()}


class MortalFiles(SystemFiles):
    """Kills its own process at the operation with a given number: before it, after it, or in the middle of a write."""

    def __init__(self, last: int) -> None:
        self._left = last
        self._lock = threading.Lock()
        self._draw = random.Random(last)

    def _count(self) -> bool:
        with self._lock:
            self._left -= 1
            if self._left == 0 and self._draw.random() < 0.5:
                die()
            return self._left <= 0

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self._count():
            super().pwrite(fd, data[: self._draw.randrange(len(data) + 1)], offset)
            die()
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        if self._count():  # and nothing else: the page cache survives the process
            die()

    def fsync(self, fd: int) -> None:
        if self._count():
            die()

    def rename(self, source: str, target: str) -> None:
        last = self._count()
        super().rename(source, target)
        if last:
            die()

    def link(self, source: str, target: str) -> None:
        last = self._count()
        super().link(source, target)
        if last:
            die()

    def unlink(self, path: str) -> None:
        last = self._count()
        super().unlink(path)
        if last:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def tell(commit: Commit) -> None:
    say(f"done {commit.number}" if commit.error is None else f"failed {commit.error}")


def live(folder: Path, last: int) -> None:
    """Open the store, or make it, and write on and on. `last` is the operation to die at; 0 to wait for the end."""
    files = MortalFiles(last) if last else SystemFiles()
    if (folder / "manifest").exists():
        store = BlockStore.open(folder, identity="child", files=files)
    else:
        store = BlockStore.create(folder, SPECS, identity="child", metadata=b"0", files=files)
    say(f"opened {store.committed}")
    number = store.committed
    limit = time.monotonic() + LIFE_S
    while time.monotonic() < limit:
        number += 1
        for block in changed(number):
            if number % 3 == 0:
                store.write(block, b"x" * SIZES[block])  # overwritten before the commit
            store.write(block, value(block, number))
        store.commit(b"%d" % number).add_done_callback(tell)
        if number % 4 == 0:
            store.drain()


def serve() -> None:
    """Fork one process per line of input, "folder last"; say its pid, and "end" when it is gone."""
    for line in sys.stdin:
        folder, last = line.rsplit(maxsplit=1)
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")  # itself, so that it is heard before all else
            try:
                live(Path(folder), int(last))
            finally:
                os._exit(1)
        os.waitpid(pid, 0)
        say("end")


if __name__ == "__main__":
    serve()
