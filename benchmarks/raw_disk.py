"""How fast this disk can be read, at best: O_DIRECT, sequential, several threads. The denominator of every bound.

python -m benchmarks.raw_disk FILE...
"""

import argparse
import errno
import itertools
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
WAYS = ((4, 8 * MIB), (8, 8 * MIB), (8, 2 * MIB), (16, 1 * MIB))
"""(threads, bytes per read) to try; disks differ in which of them is best."""
SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class DiskRate:
    """What one way of reading reached."""

    nbytes_per_s: float
    thread_count: int
    chunk_nbytes: int


class ChunkSource:
    """Hands (descriptor, offset) pairs to the threads of one measurement: every file in order, over and over."""

    def __init__(self, descriptors: Sequence[int], chunk_nbytes: int, *, skip_chunks: int, deadline_s: float) -> None:
        extents = [
            (descriptor, offset)
            for descriptor in descriptors
            for offset in range(0, os.fstat(descriptor).st_size, chunk_nbytes)
        ]
        self._chunks: Iterator[tuple[int, int]] = itertools.islice(itertools.cycle(extents), skip_chunks, None)
        self._deadline_s = deadline_s
        self._lock = threading.Lock()

    def next(self) -> tuple[int, int] | None:
        """The next chunk, or None when the time is up."""
        if time.perf_counter() > self._deadline_s:
            return None
        with self._lock:
            return next(self._chunks)


def best_read_rate(files: Sequence[Path], *, seconds: float = SECONDS) -> DiskRate:
    """The best rate of all `WAYS` over `files` in about `seconds` altogether; bypasses the page cache.

    Raises OSError when the filesystem refuses O_DIRECT, ValueError when there is nothing to read.
    """
    total_nbytes = sum(file.stat().st_size for file in files)
    if not total_nbytes:
        raise ValueError(f"nothing to read in {[str(file) for file in files]}")
    with ExitStack() as stack:
        descriptors = [_open_direct(file) for file in files]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        rates = []
        for number, (thread_count, chunk_nbytes) in enumerate(WAYS):
            # Each way starts elsewhere, so that none reads what a cache inside the drive kept of the one before.
            skip_chunks = number * total_nbytes // len(WAYS) // chunk_nbytes
            rates.append(_rate(descriptors, thread_count, chunk_nbytes, skip_chunks, seconds / len(WAYS)))
    return max(rates, key=lambda rate: rate.nbytes_per_s)


def _open_direct(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise OSError(
            errno.EINVAL,
            "this filesystem refuses O_DIRECT, so its raw rate is unknown; choose another --dir",
            str(file),
        ) from error


def _rate(
    descriptors: Sequence[int], thread_count: int, chunk_nbytes: int, skip_chunks: int, seconds: float
) -> DiskRate:
    with ExitStack() as stack:
        buffers = [stack.enter_context(mmap.mmap(-1, chunk_nbytes)) for _ in range(thread_count)]
        for buffer in buffers:
            with suppress(OSError):  # a kernel without huge pages reads a little slower
                buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer[:] = bytes(chunk_nbytes)  # the first touch must not be timed
        pool = stack.enter_context(ThreadPoolExecutor(thread_count))
        start_s = time.perf_counter()
        source = ChunkSource(descriptors, chunk_nbytes, skip_chunks=skip_chunks, deadline_s=start_s + seconds)
        nbytes = sum(pool.map(_drain, itertools.repeat(source, thread_count), buffers))
        elapsed_s = time.perf_counter() - start_s
    return DiskRate(nbytes_per_s=nbytes / elapsed_s, thread_count=thread_count, chunk_nbytes=chunk_nbytes)


def _drain(source: ChunkSource, buffer: mmap.mmap) -> int:
    nbytes = 0
    while (chunk := source.next()) is not None:
        nbytes += os.preadv(chunk[0], [buffer], chunk[1])  # short at the end of a file, which is as it should be
    return nbytes


def main() -> None:
    """Command line: print the best rate over the files named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.raw_disk", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    try:
        rate = best_read_rate(parser.parse_args().files)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{rate.nbytes_per_s / 2**30:.2f} GiB/s ({rate.thread_count} threads, {rate.chunk_nbytes // MIB} MiB reads)")


if __name__ == "__main__":
    main()
