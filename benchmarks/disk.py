"""The disk engine against fio, on the same file in the same run.

    python -m benchmarks.disk                              # a scratch file of 4 GiB, three interleaved rounds
    python -m benchmarks.disk --file model.safetensors     # reads that file; writes still go to a scratch file

fio first tries several engines, depths and block sizes once; its best three then take part in every round, and each
round counts the fastest of them. Every measurement is one pass over the whole file with O_DIRECT, past the page cache.
Nothing is fsynced on either side. What this made, it removes.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from penstock.memory.arena import HostArena
from penstock.memory.disk import DiskEngine
from penstock.memory.image import whole_window
from penstock.memory.requests import CHUNK, THREADS
from penstock.memory.transfer import Transfer

from .inference import parse_nbytes
from .reference_checkpoint import default_folder, require_free_disk

MIB = 2**20
GIB = 2**30
GOAL = 0.95
BLOCKS = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)
FINALISTS = 3
INFLIGHT_NBYTES = 2 * THREADS * CHUNK
"""What the executor keeps under way."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One set of fio's options."""

    engine: str
    depth: int
    """Requests in flight: queue depth of libaio, threads of psync."""
    block_nbytes: int

    def __str__(self) -> str:
        return f"{self.engine}, depth {self.depth}, {self.block_nbytes // MIB} MiB"


WAYS = tuple(
    Way(engine=engine, depth=depth, block_nbytes=block)
    for engine, depth, block in itertools.product(("libaio", "psync"), (4, 16, 32), (1 * MIB, 4 * MIB, 8 * MIB))
)


class FioError(RuntimeError):
    """fio is missing or failed; the message says what to do."""


def fio_rate(file: Path, way: Way, *, write: bool, nbytes: int) -> float:
    """Bytes per second of one pass over the first `nbytes` of `file`.

    Raises FioError when fio refuses.
    """
    command = ["fio", "--name=pass", f"--filename={file}", f"--rw={'write' if write else 'read'}", "--direct=1"]
    command += [f"--ioengine={way.engine}", f"--bs={way.block_nbytes}", "--allow_file_create=0", "--fallocate=none"]
    command += ["--output-format=json", "--group_reporting", "--thread"]
    if way.engine == "psync":
        share = nbytes // way.depth // way.block_nbytes * way.block_nbytes
        command += [f"--numjobs={way.depth}", f"--size={share}", f"--offset_increment={share}"]
    else:
        command += [f"--iodepth={way.depth}", f"--size={nbytes}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FioError(f"fio failed ({way}): {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write" if write else "read"]["bw_bytes"])


def our_rate(file: Path, block_nbytes: int, *, write: bool, nbytes: int) -> float:
    """Bytes per second of the disk engine in one pass, with as much in flight as the executor keeps."""
    depth = max(2, INFLIGHT_NBYTES // block_nbytes)
    engine = DiskEngine()
    arena = HostArena(depth * block_nbytes, tier="measuring")
    try:
        for at in range(0, arena.nbytes, MIB):  # drives may write zeros faster; and the first touch must not be timed
            arena.buffer[at : at + MIB] = os.urandom(MIB)
        pending: list[Transfer] = []
        start = time.perf_counter()
        for number, at in enumerate(range(0, nbytes, block_nbytes)):
            if len(pending) == depth:
                pending.pop(0).wait()
            view = arena.view(number % depth * block_nbytes, min(block_nbytes, nbytes - at))
            pending.append(_submit(engine, str(file), at, view, write=write))
        for transfer in pending:
            transfer.wait()
        return nbytes / (time.perf_counter() - start)
    finally:
        engine.close()
        arena.close()


def _submit(engine: DiskEngine, path: str, at: int, view: memoryview, *, write: bool) -> Transfer:
    if write:
        return engine.write(path, at, view)
    size = len(view)
    window = whole_window(path, at, size)
    return engine.read([window], [], view)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the rounds of one direction gave, in bytes per second, a value per round."""

    direction: str
    ways: tuple[Way, ...]
    """Those of fio that took part."""
    fio: tuple[float, ...]
    ours: dict[int, tuple[float, ...]]
    """By block size."""

    def ratio_of_medians(self, block_nbytes: int) -> float:
        """Ours over fio's."""
        return statistics.median(self.ours[block_nbytes]) / statistics.median(self.fio)

    def ratio_of_bests(self, block_nbytes: int) -> float:
        """Ours over fio's."""
        return max(self.ours[block_nbytes]) / max(self.fio)

    def to_json(self) -> dict[str, object]:
        """Everything measured and derived."""
        return {
            "direction": self.direction,
            "fio_ways": [str(way) for way in self.ways],
            "fio_nbytes_per_s": self.fio,
            "ours_nbytes_per_s": self.ours,
            "ratio_of_medians": {block: self.ratio_of_medians(block) for block in self.ours},
            "ratio_of_bests": {block: self.ratio_of_bests(block) for block in self.ours},
        }


def compare(file: Path, *, write: bool, rounds: int, nbytes: int, console: Console) -> Comparison:
    """Interleave fio and the engine: ours, fio, ours, fio, …"""
    direction = "write" if write else "read"
    console.print(f"{direction}: fio tries {len(WAYS)} ways ...", highlight=False)
    tried = {way: fio_rate(file, way, write=write, nbytes=min(nbytes, GIB)) for way in WAYS}
    ways = tuple(sorted(WAYS, key=lambda way: -tried[way])[:FINALISTS])
    fio: list[float] = []
    ours: dict[int, list[float]] = {block: [] for block in BLOCKS}
    for number in range(1, rounds + 1):
        console.print(f"{direction}: round {number} of {rounds} ...", highlight=False)
        turns = itertools.cycle(ways)
        seen = []
        for block in BLOCKS:  # fio's finalists take turns between our block sizes, so that a slow spell hits both
            ours[block].append(our_rate(file, block, write=write, nbytes=nbytes))
            seen.append(fio_rate(file, next(turns), write=write, nbytes=nbytes))
        fio.append(max(seen))
    return Comparison(
        direction=direction, ways=ways, fio=tuple(fio), ours={block: tuple(rates) for block, rates in ours.items()}
    )


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file of `nbytes` with its blocks written, removed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    require_free_disk(folder, nbytes)
    made = tempfile.mkdtemp(prefix="disk-benchmark-", dir=folder)
    try:
        file = Path(made) / "blocks.bin"
        our_rate(file, 16 * MIB, write=True, nbytes=nbytes)
        yield file
    finally:
        shutil.rmtree(made)


def render(comparisons: Sequence[Comparison]) -> Table:
    """One row per direction and block size."""
    table = Table("direction", "block", "ours, median", "best", "fio, median", "best", "medians", "bests", "goal")
    for one in comparisons:
        for block, rates in one.ours.items():
            reached = one.ratio_of_medians(block) >= GOAL
            table.add_row(
                one.direction,
                f"{block // MIB} MiB",
                f"{statistics.median(rates) / GIB:.2f} GiB/s",
                f"{max(rates) / GIB:.2f}",
                f"{statistics.median(one.fio) / GIB:.2f} GiB/s",
                f"{max(one.fio) / GIB:.2f}",
                f"{one.ratio_of_medians(block):.3f}",
                f"{one.ratio_of_bests(block):.3f}",
                f"≥ {GOAL}: {'reached' if reached else 'missed'}",
            )
    return table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--file", type=Path, help="an existing file to read; it is never written to")
    parser.add_argument("--dir", type=Path, default=None, help="where the scratch file goes (default: cache)")
    parser.add_argument("--size", type=parse_nbytes, default=4 * GIB, help="of the scratch file (default: 4GiB)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.size < 256 * MIB or arguments.size % (64 * MIB):
        parser.error("--rounds must be at least 1, --size at least 256MiB and a multiple of 64MiB")
    if arguments.file and not arguments.file.is_file():
        parser.error(f"{arguments.file} is not a file")
    if arguments.file and arguments.file.stat().st_size < 256 * MIB:
        parser.error(f"{arguments.file} is too small to measure a disk with: at least 256 MiB")
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def main() -> None:
    """Command line: print the table."""
    arguments = parse_arguments()
    progress = Console(stderr=True)
    if shutil.which("fio") is None:
        sys.exit("error: fio is not installed, and the comparison is with fio: apt install fio")
    folder = arguments.dir or default_folder()
    try:
        with scratch_file(folder, arguments.size) as scratch:
            source = arguments.file or scratch
            readable = source.stat().st_size // (64 * MIB) * 64 * MIB
            found = [
                compare(source, write=False, rounds=arguments.rounds, nbytes=readable, console=progress),
                compare(scratch, write=True, rounds=arguments.rounds, nbytes=arguments.size, console=progress),
            ]
    except (FioError, OSError) as error:
        sys.exit(f"error: {error}")
    Console(width=None if sys.stdout.isatty() else 140).print(render(found))
    for one in found:
        print(f"fio {one.direction}: {'; '.join(map(str, one.ways))}")
    if arguments.json:
        settings = {"file": str(arguments.file), "size_nbytes": arguments.size, "rounds": arguments.rounds}
        content = {"settings": settings, "comparisons": [one.to_json() for one in found]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
