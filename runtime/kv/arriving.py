"""Blocks of a prefix store on their way to a cache: some are copied while others are read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import torch

from ...memory.arena import HostArena, round_up
from ...memory.prefix import Place, PrefixHit, PrefixStore

AT_ONCE: Final = 32 * 2**20
"""About how much is on its way at once."""
ROOMS: Final = 3
"""That it is read into: one is copied from while two are read, so that the drive has more to do when one is full."""


class Arriving:
    """The blocks of a hit, from the first one on.

    Args:
        store: To read from.
        hit: What it found.
    """

    def __init__(self, store: PrefixStore, hit: PrefixHit) -> None:
        self._store = store
        self._hit = hit
        self.under_way_nbytes = 0
        """That were asked for, and have not been given yet."""

    def parts(self) -> Generator[tuple[tuple[Place, ...], torch.Tensor], None, None]:
        """Blocks as they are read, some at a time: [blocks, bytes], good until the next ones are asked for.

        While some are copied into the cache, others are read, and the drive has the next ones to go on with. It ends
        before the first block that is bad. Who closes it early waits for the blocks that the drive is at, and no more;
        once it is closed nothing reads into its memory.
        """
        places = self._hit.places
        if not places:
            return
        unit = round_up(max(place.span.nbytes for place in places))
        most = max(1, AT_ONCE // ROOMS // unit)
        waiting = deque(enumerate(places[start : start + most] for start in range(0, len(places), most)))
        arena = HostArena(unit * most * min(ROOMS, len(waiting)), tier="prefixes")
        under_way: deque[tuple[tuple[Place, ...], int, Future[int]]] = deque()
        left = threading.Event()

        def ask(readers: ThreadPoolExecutor) -> None:
            number, wanted = waiting.popleft()
            first = number % ROOMS * most
            views = [arena.view((first + at) * unit, unit) for at in range(len(wanted))]
            hit = replace(self._hit, places=wanted)
            reading = readers.submit(self._store.read, hit, views, wanted=lambda: not left.is_set())
            under_way.append((wanted, first, reading))
            self.under_way_nbytes += _nbytes(wanted)

        try:
            with ThreadPoolExecutor(ROOMS - 1, thread_name_prefix="penstock-prefix") as readers:
                try:
                    while waiting and len(under_way) < ROOMS - 1:
                        ask(readers)
                    whole = torch.frombuffer(arena.buffer, dtype=torch.uint8).view(-1, unit)
                    while under_way:
                        wanted, first, reading = under_way.popleft()
                        good = reading.result()
                        self.under_way_nbytes -= _nbytes(wanted)
                        if good == len(wanted) and waiting:
                            ask(readers)
                        if good:
                            yield wanted[:good], whole[first : first + good]
                        if good < len(wanted):
                            return
                finally:
                    left.set()  # before the readers are waited for
        finally:
            arena.close()


def _nbytes(places: tuple[Place, ...]) -> int:
    return sum(place.span.nbytes for place in places)
