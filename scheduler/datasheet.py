"""Hardware files as a person writes them: plain numbers in the units of data sheets, checked one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec

from ..memory.errors import UsageError
from .curves import Curve
from .hardware import Drive, Dtype, Hardware, Link, Processor
from .modelshape import ITEMSIZE
from .section import Section

GB = 1e9
FARTHEST_ROWS = 1e9
"""A product of many rows is bound by arithmetic, however many: curves are level at their ends, so that end is far."""


def read_hardware(file: Path) -> Hardware:
    """A machine from a hardware file, or from the file that `penstock calibrate` wrote.

    Raises:
        UsageError: it cannot be read, is not JSON, lacks a figure, or has one that no machine has.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    return parse_hardware(text, where=str(file))


def parse_hardware(text: str, *, where: str) -> Hardware:
    """A machine from the text of such a file; `where` names it in errors.

    Raises:
        UsageError: as of `read_hardware`.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where}: holds a {type(data).__name__}: a hardware file is an object with name, cpu, drives")
    if isinstance(data.get("hardware"), dict):  # what calibrate keeps, and prints with --json, says more than that
        data = data["hardware"]
    if "host_nbytes" in data:  # no data sheet has that key: it is what calibrate writes
        try:
            return msgspec.convert(data, Hardware)
        except msgspec.ValidationError as error:
            raise UsageError(f"{where}: is no calibration of this version ({error}): run penstock calibrate") from error
    return _machine(Section(data, where=where, path=""))


def _machine(top: Section) -> Hardware:
    gpu, link = None, None
    if "gpu" in top:
        section = top.section("gpu")
        count = section.whole("count", 1, 1024, "GPUs", 1)
        peer = section.number("peer_gb_per_s", 0, 2000, "GB/s", 0) * GB
        gpu = _processor(section, bandwidth=(10, 20_000))
        link = _link(top.section("link"), peer)
    else:
        count = 1
    cpu_section = top.section("cpu")
    cpu = _processor(cpu_section, bandwidth=(1, 5_000))
    drives = tuple(_drive(each) for each in top.sections("drives"))
    machines = top.whole("machines", 1, 10_000, "machines", 1)
    network = top.number("network_gb_per_s", 0, 1000, "GB/s", 0) * GB
    name, sources = top.text("name"), top.texts("sources")
    price = top.number("price_usd", 0, 1e7, "US dollars") if "price_usd" in top else None
    top.done()
    return Hardware(
        name=name,
        cpu=cpu,
        host_nbytes=cpu.memory_nbytes,
        drives=drives,
        gpu=gpu,
        link=link,
        gpus=count,
        machines=machines,
        network=network,
        price_usd=price,
        sources=sources,
    )


def _processor(section: Section, *, bandwidth: tuple[float, float]) -> Processor:
    """A GPU or a CPU: the same figures, in other ranges."""
    name = section.text("name")
    memory_nbytes = round(section.number("memory_gb", 0.25, 100_000, "GB") * GB)
    reached = section.number("memory_fraction", 0.05, 1, "of the data sheet's bandwidth that programs reach", 1)
    memory = section.curve("bandwidth_gb_per_s", *bandwidth, "GB/s").scaled(GB * reached)
    busy = section.number("tflops_fraction", 0.02, 1.2, "of the data sheet's peak that products reach", 1)
    batched = section.number("attention_fraction", 0.02, 1.2, "of what products reach that attention does", 0.47)
    cached = memory.best
    if "attention_gb_per_s" in section:
        cached = section.number("attention_gb_per_s", 0.1, bandwidth[1], "GB/s of keys and values") * GB
    rates = section.section("tflops")
    linear: dict[Dtype, Curve] = {}
    attention: dict[Dtype, Curve] = {}
    for dtype in rates.keys:
        if dtype not in ITEMSIZE:
            raise rates.error(dtype, dtype, f"one of {', '.join(ITEMSIZE)} as a key")
        peak = rates.curve(dtype, 0.001, 20_000, "TFLOPS").scaled(1e12 * busy)
        linear[dtype] = roofline(memory.best, peak, ITEMSIZE[dtype])
        attention[dtype] = roofline(cached, peak.scaled(batched), max(ITEMSIZE[dtype], 2))
    if not linear:
        raise UsageError(f"{section.error('tflops', {}, 'at least float16 or float32 with its TFLOPS')}")
    rates.done()
    processor = Processor(
        name=name,
        memory_nbytes=memory_nbytes,
        memory=memory,
        linear=linear,
        attention=attention,
        adam=section.number("adam_gelements_per_s", 0, 1000, "10^9 elements/s", 0) * GB,
        launch_s=section.number("launch_us", 0, 1000, "microseconds", 0) * 1e-6,
        cores=section.whole("cores", 0, 4096, "cores", 0),
    )
    section.done()
    return processor


def roofline(memory: float, flops: Curve, itemsize: int) -> Curve:
    """Bytes of an operand per second that a product takes, by rows: as fast as memory, or as arithmetic allows.

    Args:
        memory: Bytes per second.
        flops: Operations per second by rows.
        itemsize: Of an element; each takes two operations per row.
    """

    def arithmetic(rows: float) -> float:
        return flops.at(rows) * itemsize / (2 * rows)

    rows = sorted({1.0, *(x for x in flops.x if x > 1), FARTHEST_ROWS})
    points = {1.0: min(memory, arithmetic(1.0))}
    for low, high in pairwise(rows):
        if arithmetic(low) > memory > arithmetic(high):  # where one becomes the other: the curve has a corner there
            crossing = _crossing(memory, arithmetic, low, high)
            points[crossing] = memory
        points[high] = min(memory, arithmetic(high))
    return Curve.through(points.items())


def _crossing(memory: float, arithmetic: Callable[[float], float], low: float, high: float) -> float:
    """Where arithmetic becomes slower than memory; both ends are straight on logarithmic axes."""
    a, b = math.log(arithmetic(low) / memory), math.log(arithmetic(high) / memory)
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * a / (a - b))


def _link(section: Section, peer: float) -> Link:
    h2d = section.curve("h2d_gb_per_s", 0.1, 2000, "GB/s").scaled(GB)
    link = Link(
        h2d=h2d,
        d2h=section.curve("d2h_gb_per_s", 0.1, 2000, "GB/s", h2d.best / GB).scaled(GB),
        h2d_pageable=_optional(section, "h2d_pageable_gb_per_s", 2000),
        d2h_pageable=_optional(section, "d2h_pageable_gb_per_s", 2000),
        duplex=section.number("duplex", 0.1, 1, "of each rate while both directions are busy", 1),
        latency_s=section.number("latency_us", 0, 10_000, "microseconds", 0) * 1e-6,
        peer=peer,
    )
    section.done()
    return link


def _optional(section: Section, key: str, high: float) -> Curve | None:
    return section.curve(key, 0.01, high, "GB/s").scaled(GB) if key in section else None


def _drive(section: Section) -> Drive:
    """One drive, or `count` of them that are striped: rates and sizes are of one."""
    count = section.whole("count", 1, 1000, "drives", 1)
    drive = Drive(
        name=section.text("name") if count == 1 else f"{count} × {section.text('name')}",
        read=section.curve("read_gb_per_s", 0.01, 500, "GB/s").scaled(GB * count),
        write=section.curve("write_gb_per_s", 0.01, 500, "GB/s").scaled(GB * count),
        read_direct=None if (found := _optional(section, "read_direct_gb_per_s", 500)) is None else found.scaled(count),
        mixed=section.number("mixed", 0.1, 2, "of the mean rate while reading and writing", 1),
        latency_s=section.number("latency_us", 0, 1e6, "microseconds", 0) * 1e-6,
        capacity_nbytes=round(section.number("capacity_tb", 0, 10_000, "TB", 0) * 1e12) * count,
        endurance_nbytes=round(section.number("endurance_tbw", 0, 1e6, "TB written", 0) * 1e12) * count,
    )
    section.done()
    return drive
