"""What a profile costs in the file: seconds to write, read and show a million records, and bytes per record.

    python -m benchmarks.profile_files
    python -m benchmarks.profile_files --records 100000 --per-segment 500 --repeat 1

The records are of every kind that a run of a model streamed over three tiers leaves: reads and copies, uses, waits,
spans of modules, steps, memory, gauges, marks; with noise in their times. Seconds of writing and reading are CPU time
of the one thread that works. `penstock prof stats` and `penstock prof report` are timed as a user would: each in a
fresh process, from its start to its end, imports included; the median of some runs. Also printed: what leaving a
record in the ring costs the thread that is profiled.
"""

import argparse
import random
import statistics
import subprocess
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
    Gauge,
    Header,
    Link,
    Mark,
    MarkKind,
    Memory,
    Meter,
    Module,
    Phase,
    Record,
    Step,
    Storage,
    Tables,
    Tier,
    Transfer,
    Use,
    Wait,
)
from penstock.runtime.profiler.writer import ProfileWriter

from .inference import CHECKOUT

LAYERS = 80
MIB = 2**20
READ_GOAL_S = 1.5
BYTES_GOAL = 20.0
STATS_GOAL_S = 3.0
REPORT_GOAL_S = 10.0
REPORT_GOAL_NBYTES = 5_000_000
GAUGES_NS = 50_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--per-segment", type=int, default=4_000, help="records per segment: those of about a second")
    parser.add_argument("--repeat", type=int, default=3, help="how often each verb is run")
    options = parser.parse_args(arguments)
    records = list(_records(options.records))
    with tempfile.TemporaryDirectory() as folder:
        path, page = Path(folder) / "run.prof", Path(folder) / "run.html"
        append_s, write_s = _write(path, records, options.per_segment)
        began = time.thread_time()
        profile = read_profile(path)
        read_s = time.thread_time() - began
        count = sum(len(profile[kind]) for kind in RECORDS)
        nbytes = path.stat().st_size
        if count != len(records) or profile.problems:
            print(f"{len(records)} records were written and {count} were read: {profile.problems}", file=sys.stderr)
            return 1
        print("records " + ", ".join(f"{len(profile[kind])} {kind.__name__.lower()}" for kind in RECORDS))
        del records, profile  # the processes to come need the memory
        stats_s = _took("stats", path, repeat=options.repeat)
        report_s = _took("report", path, "-o", page, "--force", repeat=options.repeat)
        page_nbytes = page.stat().st_size
    print(f"append  {append_s / count * 1e6:.2f} µs per record")
    print(f"write   {write_s:.2f} s, {write_s / count * 1e6:.2f} µs per record")
    print(f"read    {read_s:.2f} s (goal {READ_GOAL_S})")
    print(f"file    {nbytes / MIB:.1f} MiB, {nbytes / count:.1f} bytes per record (goal {BYTES_GOAL:.0f})")
    print(f"stats   {stats_s:.2f} s (goal {STATS_GOAL_S})")
    print(f"report  {report_s:.2f} s (goal {REPORT_GOAL_S})")
    print(f"page    {page_nbytes / 1e6:.2f} MB (goal {REPORT_GOAL_NBYTES / 1e6:g})")
    reached = (
        read_s < READ_GOAL_S,
        nbytes / count <= BYTES_GOAL,
        stats_s < STATS_GOAL_S,
        report_s < REPORT_GOAL_S,
        page_nbytes <= REPORT_GOAL_NBYTES,
    )
    return 0 if all(reached) else 1


def _took(verb: str, *rest: str | Path, repeat: int) -> float:
    """Seconds of `penstock prof VERB …` in a process of its own, median."""
    command = [sys.executable, "-m", "penstock", "prof", verb, *map(str, rest)]
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=CHECKOUT)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


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
    for batch in _steps(random.Random(0)):
        for record in batch:
            if made == count:
                return
            made += 1
            yield record


def _steps(chance: random.Random) -> Iterator[list[Record]]:
    """The records of one layer after another, in the order in which a recorder leaves them; a step's own after it."""
    now = 5_000_000_000_000
    number = transfers = 0
    gauged = 0
    while True:
        start = now
        for layer in range(LAYERS):
            batch, now = _layer(chance, layer, now, transfers)
            transfers += 2
            if now - gauged > GAUGES_NS:
                gauged = now
                batch += _gauges(chance, now, number)
            yield batch
        ended: list[Record] = [
            Memory(at=now, tier=Tier.DEVICE, category=Category.KV, nbytes=LAYERS * 4096),
            Step(id=number, phase=0, start=start, end=now, tokens=1),
        ]
        if number % 50 == 0:
            ended.append(Mark(at=now, kind=MarkKind.RELEARN))
        yield ended
        number += 1


def _layer(chance: random.Random, layer: int, now: int, transfers: int) -> tuple[list[Record], int]:
    """What one layer leaves, and when it ends."""
    issued = now - int(chance.gauss(7e6, 1.5e6))
    start = issued + int(chance.expovariate(1 / 1e5))
    landed = start + int(chance.gauss(3e6, 4e5))
    ready = landed + int(chance.gauss(2e6, 2e5))
    module, nbytes = layer * 5, (10 + layer % 3) * MIB
    read = Transfer(
        id=transfers, block=layer, link=Link.DISK_READ, nbytes=nbytes, cause=Cause.PREFETCH, issued=issued,
        start=start, end=landed,
    )  # fmt: skip
    copy = Transfer(
        id=transfers + 1, parent=transfers, block=layer, link=Link.H2D, nbytes=nbytes, cause=Cause.PREFETCH,
        issued=issued, start=landed, end=ready,
    )  # fmt: skip
    batch: list[Record] = [read, copy, Use(block=layer, at=now, ready=ready, issued=issued, module=module)]
    if ready > now:
        batch.append(Wait(block=layer, needed=now, ready=ready, module=module))
        now = ready
    began = now
    for inner in range(module + 1, module + 5):
        size = chance.randrange(1, 5000) * 512
        batch.append(Memory(at=now, tier=Tier.DEVICE, category=Category.ACTIVATION, nbytes=size, module=inner))
        end = now + int(chance.gauss(1e6, 1e5))
        batch.append(Compute(module=inner, phase=Phase.FORWARD, start=now, end=end, launched=now - 5000, depth=1))
        batch.append(Memory(at=end, tier=Tier.DEVICE, category=Category.ACTIVATION, nbytes=-size, module=inner))
        now = end + int(chance.expovariate(1 / 1e4))
    batch.append(Compute(module=module, phase=Phase.FORWARD, start=began, end=now, launched=began - 5000))
    return batch, now


def _gauges(chance: random.Random, now: int, step: int) -> list[Record]:
    """All meters but those of energy, as memory wanders."""
    base = 4096 * MIB + step * LAYERS * 4096
    meters = [meter for meter in Meter if meter not in (Meter.ENERGY_CPU, Meter.ENERGY_DEVICE)]
    return [Gauge(at=now, meter=meter, value=base + chance.randrange(64) * MIB) for meter in meters]


def _tables() -> Tables:
    modules = {
        i: Module(path=f"model.layers.{i // 5}" + (f".part{i % 5}" if i % 5 else ""), kind="Layer", parent=-1)
        for i in range(LAYERS * 5)
    }
    blocks = {
        i: Block(name=f"layers.{i}", nbytes=(10 + i % 3) * MIB, home=Tier.DISK, module=i * 5) for i in range(LAYERS)
    }
    storages = {
        i: Storage(
            names=(f"model.layers.{i}.norm",), nbytes=8192, dtype="bfloat16", shape=(4096,), category=Category.WEIGHT,
            tier=Tier.HOST, module=i * 5,
        )
        for i in range(LAYERS)
    }  # fmt: skip
    return {"modules": modules, "blocks": blocks, "storages": storages, "strings": {0: "decode"}}


def _header() -> Header:
    return Header(
        run="0123456789abcdef",
        level="full",
        began_ns=4_999_000_000_000,
        began_unix_s=0.0,
        argv=("generate.py",),
        versions={"penstock": "0.1.0"},
        machine={"host": "somewhere"},
        capacities={"DEVICE": 16384 * MIB, "HOST": 32768 * MIB},
        budgets={"DEVICE": 8192 * MIB, "HOST": 8192 * MIB},
        peaks={"DISK_READ": 4.0 * 2**30, "H2D": 8.0 * 2**30},
    )


if __name__ == "__main__":
    sys.exit(main())
