"""What a profile costs in the file: seconds to write and to read a million records, and bytes per record.

    python -m benchmarks.profile_files
    python -m benchmarks.profile_files --records 100000 --per-segment 500

The records are those of a streamed model with noise in their times: reads, uses, waits and spans of modules. Seconds
are CPU time of the one thread that works. Also printed: what leaving a record in the ring costs the thread that is
profiled.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.runtime.profiler.reader import read_profile
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import (
    RECORDS,
    Block,
    Category,
    Cause,
    Compute,
    Header,
    Link,
    Memory,
    Module,
    Phase,
    Record,
    Tables,
    Tier,
    Transfer,
    Use,
    Wait,
)
from penstock.runtime.profiler.writer import ProfileWriter

LAYERS = 80
MIB = 2**20
READ_GOAL_S = 1.5
BYTES_GOAL = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--per-segment", type=int, default=4_000, help="records per segment: those of about a second")
    options = parser.parse_args(arguments)
    records = list(_records(options.records))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.prof"
        append_s, write_s = _write(path, records, options.per_segment)
        began = time.thread_time()
        profile = read_profile(path)
        read_s = time.thread_time() - began
        count = sum(len(profile[kind]) for kind in RECORDS)
        nbytes = path.stat().st_size
    if count != len(records) or profile.problems:
        print(f"{len(records)} records were written and {count} were read: {profile.problems}", file=sys.stderr)
        return 1
    print(f"records {count}, of which waits and uses {len(profile[Wait]) + len(profile[Use])}")
    print(f"append  {append_s / count * 1e6:.2f} µs per record")
    print(f"write   {write_s:.2f} s, {write_s / count * 1e6:.2f} µs per record")
    print(f"read    {read_s:.2f} s (goal {READ_GOAL_S})")
    print(f"file    {nbytes / MIB:.1f} MiB, {nbytes / count:.1f} bytes per record (goal {BYTES_GOAL:.0f})")
    return 0 if read_s < READ_GOAL_S and nbytes / count <= BYTES_GOAL else 1


def _write(path: Path, records: Sequence[Record], per_segment: int) -> tuple[float, float]:
    """Seconds that appending took, and CPU seconds that writing took."""
    ring = Ring(1024 * MIB)
    # The interval is never reached: segments are written from here, so that each gets its share of the records.
    writer = ProfileWriter(path, _header(), ring, _tables(), interval_s=1e6)
    append_s = write_s = 0.0
    for first in range(0, len(records), per_segment):
        some = records[first : first + per_segment]
        began = time.perf_counter()
        for record in some:
            ring.append(record)
        append_s += time.perf_counter() - began
        began = time.thread_time()
        writer._write(last=False)
        write_s += time.thread_time() - began
    writer.close()
    return append_s, write_s


def _records(count: int) -> Iterator[Record]:
    made = 0
    for batch in _layers(random.Random(0)):
        for record in batch:
            if made == count:
                return
            made += 1
            yield record


def _layers(chance: random.Random) -> Iterator[list[Record]]:
    """The records of one layer after another, in the order in which a recorder leaves them."""
    now = 5_000_000_000_000
    number = 0
    while True:
        layer = number % LAYERS
        issued = now - int(chance.gauss(4e6, 1e6))
        start = issued + int(chance.expovariate(1 / 1e5))
        ready = start + int(chance.gauss(3e6, 4e5))
        read = Transfer(
            id=number,
            block=layer,
            link=Link.DISK_READ,
            nbytes=(10 + layer % 3) * MIB,
            cause=Cause.PREFETCH,
            issued=issued,
            start=start,
            end=ready,
        )
        batch: list[Record] = [read, Use(block=layer, at=now, ready=ready, issued=issued, module=layer * 5)]
        if ready > now:
            batch.append(Wait(block=layer, needed=now, ready=ready, module=layer * 5))
            now = ready
        began = now
        for inner in range(1, 5):
            size = chance.randrange(1, 5000) * 512
            batch.append(
                Memory(at=now, tier=Tier.HOST, category=Category.ACTIVATION, nbytes=size, module=layer * 5 + inner)
            )
            end = now + int(chance.gauss(2e5, 2e4))
            batch.append(Compute(module=layer * 5 + inner, phase=Phase.FORWARD, start=now, end=end, depth=1))
            now = end + int(chance.expovariate(1 / 1e4))
        batch.append(Compute(module=layer * 5, phase=Phase.FORWARD, start=began, end=now))
        yield batch
        number += 1


def _tables() -> Tables:
    modules = {
        i: Module(path=f"model.layers.{i // 5}" + (f".part{i % 5}" if i % 5 else ""), kind="Layer", parent=-1)
        for i in range(LAYERS * 5)
    }
    blocks = {i: Block(name=f"layers.{i}", nbytes=10 * MIB, home=Tier.DISK, module=i * 5) for i in range(LAYERS)}
    return {"modules": modules, "blocks": blocks, "storages": {}, "strings": {}}


def _header() -> Header:
    return Header(
        run="0123456789abcdef",
        level="light",
        began_ns=0,
        began_unix_s=0.0,
        argv=("train.py",),
        versions={"penstock": "0.1.0"},
        machine={"host": "somewhere"},
        capacities={},
        budgets={},
        peaks={},
    )


if __name__ == "__main__":
    sys.exit(main())
