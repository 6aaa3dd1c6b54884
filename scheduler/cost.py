"""What operations and transfers take, from a machine's curves. Where two share something, both are slowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .hardware import Hardware, Processor, Where
from .operations import Operation

GRAIN_NBYTES: Final = 2 * 4 * 2**15
"""Read and written by an operation that torch lets one thread do: 2^15 elements (`at::internal::GRAIN_SIZE`)."""
LENDING: Final = 50
"""Operations that the Python of a hand-over takes as long as, on either side of it: on the one it is decided, and
arguments begin to leave; on the other weights are lent, arguments arrive, and results go back."""
SWITCH: Final = 20
"""The same of waking a thread, where that was not measured."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of operations and transfers on one machine.

    Args:
        hardware: The machine.
        threads: CPU threads that compute; 0 is all cores.
        beside: Whether threads of the CPU have to be roused for each operation that several share: another thread of
            the process computes with several, too, now and then, or they are put to rest while blocks stream.
    """

    hardware: Hardware
    threads: int = 0
    beside: bool = False

    def processor(self, where: Where) -> Processor:
        """One of the machine's processors; on a machine without a GPU both are the CPU."""
        if where == "gpu" and self.hardware.gpu is not None:
            return self.hardware.gpu
        return self.hardware.cpu

    def memory_rate(self, where: Where) -> float:
        """Bytes per second that a processor reads and writes in its memory."""
        processor = self.processor(where)
        return processor.memory.at(max(self.threads or processor.cores, 1))

    def operation_s(self, operation: Operation, where: Where) -> float:
        """Seconds that one operation takes by itself."""
        return self.compute_s((operation,), where)

    def compute_s(self, operations: Iterable[Operation], where: Where) -> float:
        """Seconds of operations that follow each other.

        A CPU starts each when the one before has ended, and so does a device that is emulated. Before a GPU the host
        runs ahead: what it takes to start all of them shows only where it is more than what they take.
        """
        started, worked = self.parts_s(operations, where)
        ahead = where == "gpu" and self.hardware.gpu is not None and not self.hardware.emulated
        return max(started, worked) if ahead else started + worked

    @property
    def processors_at_once(self) -> float:
        """How many of the CPU and the device can compute at their full speeds at the same time. An emulated device is
        the CPU's own cores, of which each takes as many as torch has threads."""
        if not self.hardware.emulated:
            return 2.0
        cores = self.hardware.cpu.cores
        return min(2.0, max(1.0, cores / (self.threads or cores))) if cores else 1.0

    @property
    def crowded(self) -> bool:
        """Whether what computes on the CPU takes all its cores."""
        cores = self.hardware.cpu.cores
        return cores > 0 and (self.threads or cores) >= cores

    @property
    def switch_s(self) -> float:
        """Seconds until a micro-batch goes on that another one has left the device to: those of waking a thread."""
        return self.hardware.cpu.switch_s or SWITCH * self._python_s

    @property
    def hand_over_s(self) -> float:
        """The same where one of them changes processors: with the Python that carries arguments and lends weights."""
        return self.switch_s + self.lending_s

    @property
    def lending_s(self) -> float:
        """Seconds of that Python, on one side of a hand-over."""
        return LENDING * self._python_s

    @property
    def _python_s(self) -> float:
        """Of a small operation, which the host starts whatever computes it."""
        gpu = self.hardware.gpu
        return self.hardware.cpu.launch_s or (gpu.launch_s if gpu is not None else 0.0)

    def parts_s(self, operations: Iterable[Operation], where: Where) -> tuple[float, float]:
        """What starting operations takes, and what they take themselves."""
        processor = self.processor(where)
        started = worked = 0.0
        for operation in operations:
            started += operation.launches * processor.launch_s
            if self.beside and processor is self.hardware.cpu and _is_shared(operation):
                started += operation.launches * processor.rouse_s
            worked += self.worked_s(operation, where)
        return started, worked

    def worked_s(self, operation: Operation, where: Where) -> float:
        """Seconds that a processor works on an operation that has been started."""
        processor = self.processor(where)
        if not operation.nbytes:
            return 0.0
        match operation.kind:
            case "linear":
                rate = processor.linear_rate(operation.dtype, max(operation.rows, 1))
            case "attention":
                rate = processor.attention_rate(operation.dtype, max(operation.rows, 1))
            case "attention back":
                rate = processor.attention_back_rate(operation.dtype, max(operation.rows, 1))
            case "memory":
                rate = self._elementwise_rate(processor, operation) or self.memory_rate(where)
            case "adam":
                rate = processor.adam or self.memory_rate(where) / 28  # reads g, p, m, v and writes p, m, v, in fp32
        return operation.nbytes / rate

    @staticmethod
    def _elementwise_rate(processor: Processor, operation: Operation) -> float | None:
        curve = processor.elementwise.get(operation.dtype)
        return curve.at(operation.nbytes / operation.launches) if curve is not None else None

    def read_s(self, nbytes: float, request_nbytes: float) -> float:
        """Seconds of reading from all drives, in requests of a size, while nothing else goes on."""
        rate = self.hardware.drives_together * sum(drive.read.at(request_nbytes) for drive in self.hardware.drives)
        return nbytes / rate

    def read_share(self, under_way: float) -> float:
        """What so many requests, over all drives, get of the rate that drives have when there are enough of them."""
        drives = self.hardware.drives
        each = max(under_way / len(drives), 1.0)
        full = sum(drive.read.best for drive in drives)
        return sum(drive.read.best * drive.depth_share(each) for drive in drives) / full

    def write_s(self, nbytes: float, request_nbytes: float) -> float:
        """The same of writing."""
        rate = self.hardware.drives_together * sum(drive.write.at(request_nbytes) for drive in self.hardware.drives)
        return nbytes / rate

    def copy_s(self, nbytes: float, request_nbytes: float, *, back: bool = False, pinned: bool = True) -> float:
        """Seconds of copying to the device (`back`: from it), in copies of a size."""
        link = self.hardware.link
        if link is None:
            return 0.0
        pageable = link.d2h_pageable if back else link.h2d_pageable
        curve = (link.d2h if back else link.h2d) if pinned or pageable is None else pageable
        return nbytes / curve.at(request_nbytes)


def _is_shared(operation: Operation) -> bool:
    """Whether several threads do it."""
    return operation.kind != "memory" or operation.nbytes / operation.launches > GRAIN_NBYTES
