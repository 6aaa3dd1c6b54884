"""A machine in figures: measured here (`penstock calibrate`), or taken from a data sheet. Costs are worked out from it.

All rates are in bytes, operations or elements per second, all sizes in bytes, all times in seconds.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from ..memory.errors import UsageError
from ..memory.requests import THREADS
from .curves import Curve

ATTENTION_BACK: Final = 2.5
"""Attention's backward over its forward, where it was not measured: five products instead of two, since the scores are
worked out again (Dao, "FlashAttention-2", 2023, section 3.1.2)."""
Dtype = str
"""As torch names it: float32, bfloat16, float16, int8."""


class Drive(msgspec.Struct, frozen=True, kw_only=True):
    """One drive, or several that are striped."""

    name: str
    read: Curve
    """Bytes per second by size of request, with as many requests under way as penstock keeps."""
    write: Curve
    """The same of writes that are on the drive when they are counted."""
    read_depth: Curve | None = None
    """Bytes per second of large reads, by requests under way."""
    mixed: float = 1.0
    """Reading and writing at once, half the bytes each: bytes per second of both together, over the harmonic mean of
    the two rates that each has alone. 1 is a drive that shares its time, so that reads and writes just add up."""
    read_direct: Curve | None = None
    """The same as `read`, into device memory without the host's (GPUDirect Storage); None where it was not measured."""
    latency_s: float = 0.0
    """Of one small read, alone."""
    capacity_nbytes: int = 0
    """0 where it is not known."""
    endurance_nbytes: int = 0
    """What may be written in its life (TBW); 0 where it is not known."""

    def depth_share(self, under_way: float) -> float:
        """What is left of its rate with so many requests under way; 1 where that was not measured."""
        if self.read_depth is None:
            return 1.0
        return min(self.read_depth.at(under_way) / self.read_depth.at(THREADS), 1.0)


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """The way between host and device memory."""

    h2d: Curve
    """Bytes per second by size of copy, from pinned memory."""
    d2h: Curve
    h2d_pageable: Curve | None = None
    d2h_pageable: Curve | None = None
    duplex: float = 1.0
    """Copies in both directions at once: what each has left of its rate."""
    latency_s: float = 0.0
    """Of one small copy, until the host knows that it is done."""
    peer: float = 0.0
    """Bytes per second between this device and another one of the same machine, each way; 0 where there is none."""


class Processor(msgspec.Struct, frozen=True, kw_only=True):
    """Something that computes, with the memory that it computes from."""

    name: str
    memory_nbytes: int
    memory: Curve
    """Bytes per second that it reads and writes in its memory: by threads on a CPU, flat on a GPU."""
    memory_read: Curve | None = None
    """The same where it only reads; None where it was not measured."""
    memory_write: Curve | None = None
    """The same where it only writes."""
    linear: dict[Dtype, Curve]
    """Bytes of weights per second that a product takes, by rows: tokens that are multiplied with the same weights. A
    product of few rows reads as fast as memory allows, one of many is bound by arithmetic: 2 · rows / itemsize
    operations per byte."""
    attention: dict[Dtype, Curve]
    """Bytes of keys and values per second that attention takes, by rows that use each of them: queries times heads per
    key-value head."""
    attention_back: dict[Dtype, Curve] = {}
    """The same of attention's backward, over the same keys and values. Empty where it was not measured."""
    elementwise: dict[Dtype, Curve] = {}
    """Bytes per second that everything else reads and writes (norms, activations, copies), by bytes of an operation.
    Empty where it was not measured: `memory` then."""
    adam: float = 0.0
    """Elements per second of AdamW with states in fp32; 0 where it was not measured."""
    launch_s: float = 0.0
    """What starting one operation of a model takes, from its Python to the operation's end."""
    operation_s: float = 0.0
    """The same of small operations in a loop, with nothing between."""
    rouse_s: float = 0.0
    """What an operation that several threads share takes more where another thread of the process computes like that,
    too: torch's threads go to sleep between operations then. 0 where it was not measured."""
    module_call_s: float = 0.0
    """What calling one module adds to that, in Python; 0 where it was not measured."""
    switch_s: float = 0.0
    """Of a CPU: from one thread's leave until another one goes on that waits for it in Python; 0 where it was not
    measured."""
    cores: int = 0
    """Of a CPU."""

    def linear_rate(self, dtype: Dtype, rows: float) -> float:
        """`linear` at so many rows; of a dtype that was not measured, from the nearest one that was.

        Raises:
            UsageError: nothing was measured.
        """
        return _of(self.linear, dtype, self.name, "linear").onward(rows)

    def attention_rate(self, dtype: Dtype, rows: float) -> float:
        """`attention` at so many rows; of a dtype that was not measured, from the nearest one that was.

        Raises:
            UsageError: nothing was measured.
        """
        return _of(self.attention, dtype, self.name, "attention").onward(rows)

    def attention_back_rate(self, dtype: Dtype, rows: float) -> float:
        """The same of its backward; worked out from `attention` where it was not measured in any dtype.

        Raises:
            UsageError: nothing was measured.
        """
        if not self.attention_back:
            return self.attention_rate(dtype, rows) / ATTENTION_BACK
        return _of(self.attention_back, dtype, self.name, "attention").onward(rows)


class Sharing(msgspec.Struct, frozen=True, kw_only=True):
    """What of its rate is left to each of two that use memory or cores together, measured together; 1 is all."""

    compute_while_reading: float = 1.0
    """A product of one row on the CPU while the disk is read at full rate."""
    read_while_computing: float = 1.0
    """Reads from disk during that product."""
    compute_while_copying: float = 1.0
    """The product while the link is busy."""
    copy_while_computing: float = 1.0
    """Copies to the device during that product."""
    start_while_reading: float = 1.0
    """Starting small operations from a model's own Python while the disk is read: the threads that read share Python's
    lock with it, and the cores."""
    read_while_starting: float = 1.0
    """Reads from disk meanwhile."""
    start_while_copying: float = 1.0
    """The same while the link is busy."""
    copy_while_starting: float = 1.0
    """Copies to the device meanwhile."""
    serve_s: float = 0.0
    """Seconds of one core that the executor's Python takes for each block that it brings; 0 where it was not
    measured."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One machine."""

    name: str
    cpu: Processor
    host_nbytes: int
    """Memory of the host."""
    drives: tuple[Drive, ...]
    """Those that weights may lie on; they are read together."""
    drives_together: float = 1.0
    """All drives read at once: what is left of the sum of their rates."""
    gpu: Processor | None = None
    link: Link | None = None
    """Where there is a `gpu`."""
    sharing: Sharing = Sharing()
    gpus: int = 1
    """Alike, each with a `link` of its own. penstock itself uses one; systems it is compared with use more."""
    machines: int = 1
    """Alike, each with all of the above."""
    network: float = 0.0
    """Bytes per second between machines, each way."""
    price_usd: float | None = None
    sources: tuple[str, ...] = ()
    """Where the figures are from."""
    emulated: bool = False
    """The device is a part of the CPU that acts as one."""

    def __post_init__(self) -> None:
        if (self.gpu is None) is not (self.link is None):
            raise UsageError(f"{self.name}: a GPU needs a link to it, and a link a GPU: give both, or neither")
        for name, value, least in (
            ("host_nbytes", self.host_nbytes, 1),
            ("cpu.memory_nbytes", self.cpu.memory_nbytes, 1),
            ("gpus", self.gpus, 1),
            ("machines", self.machines, 1),
            ("network", self.network, 0),
            ("price_usd", self.price_usd if self.price_usd is not None else 0, 0),
        ):
            if not math.isfinite(value) or value < least:
                raise UsageError(f"{self.name}: {name} is {value}: it must be {least} or more")

    @property
    def disk_read(self) -> float:
        """Bytes per second of large reads from all drives together; 0 where there is none."""
        return self.drives_together * sum(drive.read.best for drive in self.drives)

    @property
    def disk_write(self) -> float:
        """The same of writes."""
        return self.drives_together * sum(drive.write.best for drive in self.drives)


Where = Literal["cpu", "gpu"]


def _of(curves: dict[Dtype, Curve], dtype: Dtype, name: str, what: str) -> Curve:
    if dtype in curves:
        return curves[dtype]
    if not curves:
        raise UsageError(f"{name}: no {what} rate is known: run `penstock calibrate`, or give one in the hardware file")
    # Of the same width if there is one: where memory binds, bytes are what counts.
    width = _ITEMSIZE.get(dtype, 4)
    nearest = min(curves, key=lambda known: abs(math.log(_ITEMSIZE.get(known, 4) / width)))
    return curves[nearest]


_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
