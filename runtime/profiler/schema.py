"""What a profile is made of: records, and the tables that their numbers point into.

One schema for what happened and for what a simulation says would happen. Every field of a record is a whole number, so
that a file holds columns and a reader never makes a million objects. Times are nanoseconds of the host's monotonic
clock, sizes are bytes. -1 stands for none.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import msgspec

MAJOR: Final = 1
"""Readers refuse files of a newer major version."""
MINOR: Final = 2
"""Grows when fields are added: readers fill what an older file lacks with -1, and pass over what they do not know."""
NONE: Final = -1
MKL: Final = "(MKL)"
"""The path of the row that MKL's buffers have."""


class Tier(IntEnum):
    """Where bytes live."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Link(IntEnum):
    """A path between tiers."""

    DISK_READ = 0
    DISK_WRITE = 1
    H2D = 2
    D2H = 3


class Cause(IntEnum):
    """Why bytes move."""

    PREFETCH = 0
    """Brought ahead of a predicted use."""
    DEMAND = 1
    """A consumer waits for it."""
    EVICT = 2
    """Taken away to make room."""
    WRITEBACK = 3
    """A changed block goes to where it lives."""
    ROWS = 4
    """Rows of a table that a lookup wants."""


class Phase(IntEnum):
    """What a processor does."""

    FORWARD = 0
    BACKWARD = 1
    OPTIMIZER = 2


class Category(IntEnum):
    """What bytes are for."""

    WEIGHT = 0
    GRADIENT = 1
    OPTIMIZER = 2
    ACTIVATION = 3
    """Saved by autograd between forward and backward."""
    KV = 4
    BUFFER = 5
    ARENA = 6
    """Slots that blocks pass through, and staging: penstock's own, of no one module."""
    BASELINE = 7
    """What the process held before the recording began: interpreter, libraries."""
    LIBRARY = 8
    """By what it grew while libraries were imported since."""


class Meter(IntEnum):
    """What a gauge shows. Bytes, except where it says otherwise."""

    HOST_RSS = 0
    """Resident memory of the process: anonymous, shared and mapped files."""
    HOST_ANONYMOUS = 1
    HOST_CGROUP = 2
    """Charged to the process's memory cgroup, page cache included."""
    DEVICE_ALLOCATED = 3
    """Live tensors of torch's CUDA allocator."""
    DEVICE_RESERVED = 4
    """What that allocator holds of the device."""
    DEVICE_USED = 5
    """Everything in use on the device, by all processes."""
    ENERGY_CPU = 6
    """Microjoules since some start (RAPL)."""
    ENERGY_DEVICE = 7
    """Microjoules since some start (NVML)."""
    HOST_FREED = 8
    """Of `HOST_RSS` just before: what the program has given back and the C library keeps for later, at least."""


class MarkKind(IntEnum):
    """Things that happen at an instant."""

    MISMATCH = 0
    """A block was used out of the predicted order, and was there all the same."""
    DEMAND = 1
    """A block was used that nothing had asked for."""
    RELEARN = 2
    EXCHANGE = 3
    """A block took the place of another one that stayed."""
    ERROR = 4
    OOM = 5
    NOTE = 6


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What all records share: nothing but being one."""


class Step(Record, frozen=True, kw_only=True):
    """One turn of the outermost loop: a token, a training step, one call of a streamed model."""

    id: int
    phase: int
    """Index of a string: prefill, decode, train, …"""
    start: int
    end: int
    tokens: int = NONE
    module: int = NONE
    """The root whose call began it, where it began with one."""


class Compute(Record, frozen=True, kw_only=True):
    """A module at work. Spans of nested modules nest."""

    module: int
    phase: Phase
    start: int
    end: int
    lane: int = 0
    """Thread or stream; spans of one lane nest or are disjoint."""
    launched: int = NONE
    """When the host asked for it, where that is another time (CUDA)."""
    depth: int = 0
    """How many recorded modules of the same lane it runs inside."""


class Transfer(Record, frozen=True, kw_only=True):
    """Bytes of one block on one link. Transfers of a link overlap each other."""

    id: int
    block: int
    link: Link
    nbytes: int
    cause: Cause
    issued: int
    """When it was decided."""
    start: int
    end: int
    parent: int = NONE
    """The hop before this one."""
    failed: int = 0
    """1 where it ended in an error."""


class Wait(Record, frozen=True, kw_only=True):
    """A consumer that needed a block and did not have it."""

    block: int
    needed: int
    ready: int
    module: int = NONE


class Use(Record, frozen=True, kw_only=True):
    """A consumer leased a block: what prefetching was for."""

    block: int
    at: int
    ready: int
    """Since when the block was there; later than `at` where the consumer had to wait."""
    issued: int
    """When the transfer that brought it was decided; -1 where it has been there since the start."""
    module: int = NONE


class Memory(Record, frozen=True, kw_only=True):
    """Bytes taken (positive) or given back (negative)."""

    at: int
    tier: Tier
    category: Category
    nbytes: int
    module: int = NONE
    storage: int = NONE
    """Row of the storage table, where the bytes are one tensor's."""


class Gauge(Record, frozen=True, kw_only=True):
    """A meter read at an instant."""

    at: int
    meter: Meter
    value: int


class Mark(Record, frozen=True, kw_only=True):
    """Something worth knowing happened."""

    at: int
    kind: MarkKind
    block: int = NONE
    module: int = NONE
    text: int = NONE
    """Index of a string."""


class Launches(Record, frozen=True, kw_only=True):
    """Kernels of a few steps, as kineto saw them: how long they lay in the device's queue."""

    start: int
    end: int
    steps: int
    """Whole ones in it; 0 where it is a part of one."""
    launches: int
    """Those whose kernel was seen too."""
    queued: int
    """Σ (kernel begins − launch begins), nanoseconds."""


RECORDS: Final[tuple[type[Record], ...]] = (Step, Compute, Transfer, Wait, Use, Memory, Gauge, Mark, Launches)


def fields_of(kind: type[Record]) -> tuple[str, ...]:
    """The names of a record's columns."""
    return kind.__struct_fields__


class Module(msgspec.Struct, frozen=True, kw_only=True):
    """One module, by its path from the root that was profiled."""

    path: str
    """"" for the root itself; a second profiled root's paths begin with its number and a colon: "2:model.layers.0"."""
    kind: str
    """Class name."""
    parent: int
    """Row of the module above; -1 for a root."""
    sampled: bool = False
    """Its calls, and those inside it, are recorded in some calls of its root only."""


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a streamed model."""

    name: str
    nbytes: int
    home: Tier
    """Where the plan lets it live."""
    module: int
    """Row of the module that leases it; -1 where several do or none."""


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor's memory. Tied tensors are one storage with several names."""

    names: tuple[str, ...]
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    category: Category
    tier: Tier
    module: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was, repeated in every segment."""

    run: str
    """Random id."""
    level: str
    """light or full."""
    began_ns: int
    """On the monotonic clock."""
    began_unix_s: float
    """The same instant on the wall clock."""
    argv: tuple[str, ...]
    versions: dict[str, str]
    """penstock, python, torch, transformers, cuda, driver; what there is of them."""
    machine: dict[str, str]
    """host, cpu, cores, memory, gpu, filesystem, kernel; what is known of them."""
    capacities: dict[str, int]
    """By tier: what it holds in all."""
    budgets: dict[str, int]
    """By tier: what penstock may take of it; empty for a plain script."""
    peaks: dict[str, float]
    """Measured bytes per second, by name of link (`Link.name`)."""
    emulated: bool = False
    pid: int = NONE


class Footer(msgspec.Struct, frozen=True, kw_only=True):
    """What the recorder says about itself, in every segment: totals since the run began."""

    written_ns: int
    """On the monotonic clock."""
    recorded: int
    dropped: int
    """Records lost because the ring was full."""
    own_ns: int
    """CPU time of the recorder: hooks, encoding, writing."""
    last: bool = False
    """The run ended in order."""
    failure: str = ""
    """The exception that ended it, if one did."""


Row = Module | Block | Storage | str
Tables = dict[str, dict[int, Any]]
"""By table name (modules, blocks, storages, strings): rows by number."""
