"""How fast a drive is read and written: by size of request, by requests under way, both at once, and one small read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Final

from ...memory.arena import PAGE, HostArena
from ...memory.disk import DiskEngine
from ...memory.image import whole_window
from ...memory.requests import CHUNK, THREADS
from ...memory.throttle import Throttle
from ...scheduler.hardware import Drive
from .diskload import AHEAD, PIECE, DiskLoad, ProbeFile
from .sampling import LEAST, Clock, curve, figure, in_turns

KIB: Final = 2**10
SIZES: Final = (64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB, 8192 * KIB)
DEPTHS: Final = (1, 2, 4, 8, 16)
WRITE_NBYTES: Final = 768 * 2**20
"""Most that is written to a drive to measure it, besides its file: writing wears it."""
MOST_WRITES: Final = 5
"""Repetitions."""
SAMPLE_S: Final = 0.05
"""A repetition should last so long."""

EngineMaker = Callable[[int, int], DiskEngine]
"""Makes an engine for (requests under way, bytes per request)."""


def engine_maker(throttle: Throttle | None = None) -> EngineMaker:
    """Engines as models have them, apart from what is varied."""
    return lambda threads, nbytes: DiskEngine(
        threads=threads, chunk_nbytes=nbytes, finest_nbytes=nbytes, throttle=throttle
    )


@dataclass(frozen=True, kw_only=True)
class DriveProbe:
    """Measures one drive.

    Args:
        file: On it; written over.
        arena: Memory for the requests, its pages touched.
        engines: Makes the engines that do it.
        clock: Seconds since any moment.
    """

    file: ProbeFile
    arena: HostArena
    engines: EngineMaker
    clock: Clock = perf_counter

    def measure(
        self,
        name: str,
        *,
        seconds: float,
        sizes: Sequence[int] = SIZES,
        depths: Sequence[int] = DEPTHS,
        write_nbytes: int = WRITE_NBYTES,
        capacity_nbytes: int = 0,
    ) -> Drive:
        """The drive in figures, in about `seconds`.

        Args:
            name: What to call it.
            seconds: For all of it; more on a drive that is slower than 50 MB/s.
            sizes: Of requests, in bytes.
            depths: Requests under way, of 4 MiB each; no more than 16 are asked for ahead.
            write_nbytes: Most that is written.
            capacity_nbytes: To be passed on.

        Raises:
            DiskError: the drive failed.
        """
        sample = self._sample_nbytes("read", self._once("read", THREADS, CHUNK, PIECE))
        reads = in_turns(
            {size: partial(self._once, "read", THREADS, size, sample) for size in sizes},
            seconds=seconds * 0.3,
            clock=self.clock,
        )
        depth = in_turns(
            {each: partial(self._once, "read", each, CHUNK, sample) for each in depths},
            seconds=seconds * 0.3,
            clock=self.clock,
        )
        written = self._sample_nbytes("write", self._once("write", THREADS, CHUNK, PIECE))
        # The mixed ones write half of what they move, and are repeated as often.
        allowed = write_nbytes / (len(sizes) + 0.5)
        written = max(min(written, int(allowed / LEAST) // PIECE * PIECE), PIECE)
        rounds = max(min(int(allowed / written), MOST_WRITES), 1)
        writes = in_turns(
            {size: partial(self._once, "write", THREADS, size, written) for size in sizes},
            seconds=seconds * 0.25,
            clock=self.clock,
            most=rounds,
        )
        mixed = in_turns(
            {1: partial(self._once, "mix", THREADS, CHUNK, max(written // (2 * PIECE), 1) * 2 * PIECE)},
            seconds=seconds * 0.1,
            clock=self.clock,
            most=rounds,
        )
        read, write = curve(reads), curve(writes)
        harmonic = 2 / (1 / read.at(CHUNK) + 1 / write.at(CHUNK))
        return Drive(
            name=name,
            read=read,
            write=write,
            read_depth=curve(depth),
            mixed=mixed[1].value / harmonic,
            latency_s=self._latency(),
            capacity_nbytes=capacity_nbytes,
        )

    def _once(self, what: str, threads: int, request_nbytes: int, nbytes: int) -> float:
        """Bytes per second of one repetition. Starting threads and opening the file is not counted."""
        engine = self.engines(threads, request_nbytes)
        load = DiskLoad(engine, self.file, self.arena)
        try:
            engine.files.get(self.file.path, writable=what != "read")
            engine.read([whole_window(self.file.path, 0, PAGE)], [], self.arena.view(0, PAGE)).wait()
            carry_out = {"read": load.read, "write": load.write, "mix": load.mix}[what]
            start = self.clock()
            carry_out(nbytes)
            return nbytes / (self.clock() - start)
        finally:
            engine.close()

    def _sample_nbytes(self, what: str, rate: float) -> int:
        """Bytes of one repetition: enough to last, but no more than twice what is asked for ahead."""
        pieces = round(rate * SAMPLE_S / PIECE)
        least = 2 if what == "read" else 1
        return max(least, min(pieces, 2 * AHEAD)) * PIECE

    def _latency(self, reads: int = 24) -> float:
        """Seconds of one page from anywhere in the file, with what the engine adds."""
        engine = self.engines(1, CHUNK)
        place = self.arena.view(0, PAGE)
        anywhere = random.Random(0)
        samples = []
        try:
            for number in range(reads + 1):
                at = anywhere.randrange(self.file.nbytes // PAGE) * PAGE
                start = self.clock()
                engine.read([whole_window(self.file.path, at, PAGE)], [], place).wait()
                if number:  # the first one starts the thread
                    samples.append(self.clock() - start)
        finally:
            engine.close()
        return figure(samples).value


def drives_together(
    files: Sequence[ProbeFile],
    arena: HostArena,
    *,
    engines: EngineMaker,
    rates: Sequence[float],
    seconds: float,
    clock: Clock = perf_counter,
) -> float:
    """What is left of the sum of the drives' rates when all are read at once.

    Args:
        files: One on each drive.
        arena: What is read into it is not looked at: the drives share it.
        engines: Makes the one engine that reads from all.
        rates: What each reads alone, in bytes per second.
        seconds: About so long.
        clock: Seconds since any moment.

    Raises:
        DiskError: a drive failed.
    """

    def once() -> float:
        engine = engines(THREADS, CHUNK)
        try:
            for file in files:
                engine.read([whole_window(file.path, 0, PAGE)], [], arena.view(0, PAGE)).wait()
            # As many bytes from each as it reads in the same time, so that none ends long before the others.
            shares = [max(2, round(rate * 2 * SAMPLE_S / PIECE)) * PIECE for rate in rates]
            with ThreadPoolExecutor(len(files)) as pool:
                start = clock()
                each = [
                    pool.submit(DiskLoad(engine, file, arena).read, n) for file, n in zip(files, shares, strict=True)
                ]
                for future in each:
                    future.result()
                taken = clock() - start
            return sum(shares) / taken
        finally:
            engine.close()

    together = in_turns({1: once}, seconds=seconds, clock=clock)[1].value
    return min(together / sum(rates), 1.0)
