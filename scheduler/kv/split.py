"""Who attends to cold keys and values: the CPU where they lie, or the device that they are copied to.

In decoding each byte is used once per head of its group, so both are bound by bytes: the CPU by what it reads of its
memory, the device by the link. Given to both at once, in the proportion of their rates, they end together: the CPU gets

    f* = B_cpu / (B_cpu + B_link)

of what is cold, less what starting each of them takes. What lies on disk comes into host memory first, whoever attends
to it, and cannot be made faster by any split. In prefill each byte is used for many queries, the CPU is bound by
arithmetic, its rate is a small part of the link's, and the device gets all; nothing special is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor
from typing import Final, Literal

from ...memory.errors import UsageError
from ..cost import CostModel
from ..hardware import Dtype

Binding = Literal["cpu", "link", "disk", "device", "host memory"]
"""What a step waits for."""
GAIN: Final = 0.05
"""The part of its time that a second processor must save: results are then equal to rounding only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvRates:
    """Bytes of keys and values per second, as measured while the others are at work, too."""

    cpu: float
    """Attention on the CPU, from host memory."""
    link: float | None = None
    """Copies to the device; None where there is none, so that the CPU attends to all."""
    device: float = 0.0
    """Attention on the device, from its memory; 0 where it does not count."""
    disk: float = 0.0
    """Reads into host memory; 0 where nothing is on disk."""
    host_memory: float = 0.0
    """What the host's memory gives to all of them together; 0 where it does not bind."""
    cpu_start_s: float = 0.0
    """Before the CPU begins and after it ends: queries down, results up, waking it."""
    link_start_s: float = 0.0
    """Of a copy that does not depend on its size."""

    def __post_init__(self) -> None:
        rates = (self.cpu, self.device, self.disk, self.host_memory, self.cpu_start_s, self.link_start_s)
        if self.cpu <= 0 or min(rates) < 0 or (self.link is not None and self.link <= 0):
            raise UsageError(f"rates must be positive, and times not negative: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdBlocks:
    """What one group of layers attends to in one step."""

    host: int
    """Blocks in host memory."""
    disk: int = 0
    """Blocks on disk only."""
    block_nbytes: int
    hot_nbytes: int = 0
    """On the device already."""
    disk_passes: float = 2.0
    """Times that a byte from disk passes host memory before anybody attends to it: written by the drive, and read to
    the place where it stays. 1 where it is read into its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvSplit:
    """A choice, and what it takes if everything overlaps."""

    cpu_blocks: int
    link_blocks: int
    seconds: float
    binds: Binding

    @property
    def cpu_share(self) -> float:
        """The part of the cold blocks that the CPU attends to; 0 where there are none."""
        blocks = self.cpu_blocks + self.link_blocks
        return self.cpu_blocks / blocks if blocks else 0.0


def ideal_share(rates: KvRates) -> float:
    """f*: the CPU's part of what is cold, if starting cost nothing and blocks had no size."""
    return 1.0 if rates.link is None else rates.cpu / (rates.cpu + rates.link)


def split(cold: ColdBlocks, rates: KvRates, *, exact: bool = False, gain: float = GAIN) -> KvSplit:
    """The split with the least time, in whole blocks.

    One processor is preferred to two where they save less than `gain` of its time, the device to the CPU.

    Args:
        cold: What is attended to.
        rates: Of the machine.
        exact: Never split, so that results are those of one processor, bit by bit: the device's, where there is one.
        gain: The part of the time that is worth it.

    Raises:
        UsageError: something is on disk, and it has no rate.
    """
    blocks = cold.host + cold.disk
    if cold.disk and not rates.disk:
        raise UsageError(f"{cold.disk} blocks are on disk, and its rate is not known: measure it first")
    if rates.link is None:
        return _taken(cold, rates, blocks)
    alone = _taken(cold, rates, 0)
    if exact or not blocks:
        return alone
    best = min(
        (_taken(cold, rates, count) for count in sorted(_candidates(cold, rates))),
        key=lambda one: (one.seconds, one.cpu_blocks),
    )
    return best if best.seconds <= alone.seconds * (1 - gain) else alone


def rates_of(
    costs: CostModel, dtype: Dtype, *, rows: float, copy_nbytes: float, read_nbytes: float, at_once: bool = True
) -> KvRates:
    """Rates of a calibrated machine.

    Args:
        costs: Of the machine.
        dtype: Of keys and values.
        rows: Queries that use each key: those of a step times heads per key-value head.
        copy_nbytes: Size of one copy over the link.
        read_nbytes: Size of one request to a drive.
        at_once: Whether the CPU attends while copies are under way: each slows the other as measured.
    """
    machine, sharing = costs.hardware, costs.hardware.sharing
    cpu = machine.cpu.attention_rate(dtype, rows)
    device = link = None
    if machine.gpu is not None:
        device = machine.gpu.attention_rate(dtype, rows)
        link = copy_nbytes / costs.copy_s(copy_nbytes, copy_nbytes)
    if at_once and link is not None:
        cpu, link = cpu * sharing.compute_while_copying, link * sharing.copy_while_computing
    return KvRates(
        cpu=cpu,
        link=link,
        device=device or 0.0,
        disk=read_nbytes / costs.read_s(read_nbytes, read_nbytes) if machine.drives else 0.0,
        host_memory=costs.memory_rate("cpu"),
        cpu_start_s=costs.hand_over_s,
        link_start_s=machine.link.latency_s if machine.link is not None else 0.0,
    )


def _candidates(cold: ColdBlocks, rates: KvRates) -> Iterator[int]:
    """Counts beside the one where CPU and link end together, and beside that where it no longer matters: times rise on
    both sides of it. None and all are apart, since who has nothing to do need not be started."""
    assert rates.link is not None
    blocks, unit = cold.host + cold.disk, cold.block_nbytes
    yield 0
    yield blocks
    rate = unit / rates.cpu + unit / rates.link
    together = (blocks * unit / rates.link + rates.link_start_s - rates.cpu_start_s) / rate
    for count in (floor(together), ceil(together)):
        yield min(max(count, 0), blocks)
    yield min(1, blocks)
    yield max(blocks - 1, 0)
    if rates.device:
        # What crosses the link is attended to by the device, beside what is there: fewer may be better for it.
        device = ((blocks * unit + cold.hot_nbytes) / rates.device - rates.cpu_start_s) / (
            unit / rates.cpu + unit / rates.device
        )
        for count in (floor(device), ceil(device)):
            yield min(max(count, 0), blocks)


def _taken(cold: ColdBlocks, rates: KvRates, cpu_blocks: int) -> KvSplit:
    unit = cold.block_nbytes
    link_blocks = cold.host + cold.disk - cpu_blocks
    device_nbytes = cold.hot_nbytes + link_blocks * unit
    host_nbytes = (cold.host + cold.disk + cold.disk * cold.disk_passes) * unit
    taken: dict[Binding, float] = {
        "device": device_nbytes / rates.device if rates.device else 0.0,
        "link": link_blocks * unit / rates.link + rates.link_start_s if rates.link and link_blocks else 0.0,
        "cpu": cpu_blocks * unit / rates.cpu + rates.cpu_start_s if cpu_blocks else 0.0,
        "disk": cold.disk * unit / rates.disk if cold.disk else 0.0,
        "host memory": host_nbytes / rates.host_memory if rates.host_memory else 0.0,
    }
    binds = max(taken, key=lambda what: taken[what])
    return KvSplit(cpu_blocks=cpu_blocks, link_blocks=link_blocks, seconds=taken[binds], binds=binds)
