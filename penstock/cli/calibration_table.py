"""A calibration as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping

from rich.text import Text

from ..scheduler.calibration import Calibration
from ..scheduler.curves import Curve
from ..scheduler.hardware import Drive, Hardware, Link, Processor
from ..sizes import format_size

GIB = 2**30
_NAME, _CELL = 16, 8


def calibration_lines(calibration: Calibration) -> list[Text]:
    """All figures: curves as rows of GiB/s with the median of their spreads, then single ones."""
    hardware = calibration.hardware
    lines = [Text(f"{hardware.name}, for {calibration.device}", style="bold"), Text("rates in GiB/s", style="dim")]
    for drive in hardware.drives:
        lines += _drive(drive)
    if hardware.link is not None:
        lines += _link(hardware.link)
    lines += _processor(hardware.cpu)
    if hardware.gpu is not None and not hardware.emulated:
        lines += _processor(hardware.gpu)
    lines += [Text(), Text("at once", style="bold"), *_sharing(hardware)]
    return lines


def _drive(drive: Drive) -> Iterator[Text]:
    yield from _group(f"drive {drive.name}, by size of request", {"read": drive.read, "write": drive.write}, _short)
    if drive.read_depth is not None:
        yield from _group("by requests under way", {"read": drive.read_depth}, _plain)
    yield _single("small read", f"{drive.latency_s * 1e6:.0f} us")
    yield _single("read and write", f"{drive.mixed:.2f} of what taking turns would give")


def _link(link: Link) -> Iterator[Text]:
    rows = {"to device": link.h2d, "to host": link.d2h}
    if link.h2d_pageable is not None and link.d2h_pageable is not None:
        rows |= {"to dev. pageable": link.h2d_pageable, "to host pageable": link.d2h_pageable}
    yield from _group("link, by size of copy", rows, _short)
    yield _single("both ways", f"{link.duplex:.2f} of each rate")
    yield _single("small copy", f"{link.latency_s * 1e6:.0f} us")


def _processor(processor: Processor) -> Iterator[Text]:
    memory = {"copy": processor.memory, "read": processor.memory_read, "write": processor.memory_write}
    by = "memory, by threads" if processor.cores else "memory"
    yield from _group(f"{processor.name}: {by}", {n: c for n, c in memory.items() if c is not None}, _plain)
    yield from _group("weights of a product, by rows", processor.linear, _plain)
    yield from _group("keys and values of attention, by rows that use each", processor.attention, _plain)
    yield from _group("the same of attention's backward", processor.attention_back, _plain)
    yield from _group("what other operations read and write, by bytes of one", processor.elementwise, _short)
    yield _single("AdamW", f"{processor.adam / 1e6:.0f} million elements/s")
    yield _single("small operation", f"{processor.operation_s * 1e6:.1f} us")
    yield _single("in a model", f"{processor.launch_s * 1e6:.1f} us for each operation, Python and all")
    if processor.rouse_s:
        yield _single("rousing threads", f"{processor.rouse_s * 1e6:.1f} us more for each, where two threads compute")
    yield _single("calling a module", f"{processor.module_call_s * 1e6:.1f} us")
    if processor.switch_s:
        yield _single("waking a thread", f"{processor.switch_s * 1e6:.0f} us")


def _sharing(hardware: Hardware) -> Iterator[Text]:
    sharing = hardware.sharing
    if hardware.drives:
        yield _single(
            "product, reads", f"{sharing.compute_while_reading:.2f} and {sharing.read_while_computing:.2f} of each rate"
        )
        yield _single(
            "Python, reads", f"{sharing.start_while_reading:.2f} and {sharing.read_while_starting:.2f} of each rate"
        )
        if sharing.serve_s:
            yield _single("bringing a block", f"{sharing.serve_s * 1e6:.0f} us of a core, besides reading")
    if hardware.link is not None:
        yield _single(
            "product, copies",
            f"{sharing.compute_while_copying:.2f} and {sharing.copy_while_computing:.2f} of each rate",
        )
        yield _single(
            "Python, copies",
            f"{sharing.start_while_copying:.2f} and {sharing.copy_while_starting:.2f} of each rate",
        )
    if len(hardware.drives) > 1:
        yield _single("all drives", f"{hardware.drives_together:.2f} of the sum of their rates")


def _group(title: str, rows: Mapping[str, Curve], label: Callable[[float], str]) -> Iterator[Text]:
    """Curves over the same x."""
    if not rows:
        return
    points = sorted({x for curve in rows.values() for x in curve.x})
    yield Text()
    yield Text(title, style="bold")
    yield Text(
        " " * (_NAME + 2) + "".join(f"{label(x):>{_CELL}}" for x in points) + f"{'spread':>{_CELL}}", style="dim"
    )
    for name, curve in rows.items():
        values = dict(zip(curve.x, curve.y, strict=True))
        cells = "".join(f"{_rate(values.get(x)):>{_CELL}}" for x in points)
        spread = f"{statistics.median(curve.spread):.0%}" if curve.spread else "-"
        yield Text.assemble("  ", (f"{name:<{_NAME}}", "cyan"), cells, f"{spread:>{_CELL}}")


def _single(name: str, value: str) -> Text:
    return Text.assemble("  ", (f"{name:<{_NAME}}", "cyan"), "  ", value)


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / GIB:.2f}" if value < 100 * GIB else f"{value / GIB:.0f}"


def _short(nbytes: float) -> str:
    """A size that is a power of two: "64 KiB"."""
    number, unit = format_size(int(nbytes)).split()
    return f"{float(number):g} {unit}"


def _plain(x: float) -> str:
    return f"{x:g}"
