"""What an update of masters and states takes by itself, on the CPU or on a device apart, at a machine's rates."""

from __future__ import annotations

from math import ceil
from typing import Final

from .cost import CostModel
from .operations import Operation
from .stepload import UpdateWork

CHECKSUM: Final = 8.5e9
"""Bytes per second that one thread checks, where memory does not give it less: xxh3, measured on 4 MiB at a time."""


def update_s(
    work: UpdateWork,
    cost: CostModel,
    elements: float,
    *,
    arrays: int,
    tensors: float = 1,
    checked_nbytes: float = 0.0,
) -> float:
    """Seconds of the CPU for the update of so many elements of some tensors, with checksums of those of their states
    that are moved.

    penstock's kernels are some torch operations on one sub-chunk after the other, so that is what they take. And each
    sub-chunk comes from memory and goes back to it, while what was calibrated are operations on what is in a cache.

    Args:
        work: Of the optimizer.
        cost: Of the machine.
        elements: How many.
        arrays: Of fp32: masters and states.
        tensors: That these belong to.
        checked_nbytes: Of their masters and states, those that are read and written.
    """
    launches = work.operations * ceil(max(tensors, elements / work.elements, 1))
    kernel = Operation(kind="memory", nbytes=work.nbytes * elements, launches=launches)
    memory = 2 * 4 * arrays * elements / cost.memory_rate("cpu")
    return cost.operation_s(kernel, "cpu") + memory + checks_s(cost, checked_nbytes)


def checks_s(cost: CostModel, nbytes: float) -> float:
    """Seconds of the CPU for checksums of so much, which is read and written."""
    cpu = cost.processor("cpu")
    return 2 * nbytes / min(CHECKSUM, (cpu.memory_read or cpu.memory).at(1))


def update_there_s(work: UpdateWork, cost: CostModel, elements: float, *, tensors: float = 1) -> float:
    """Seconds of a device apart for the update of so many elements that are there: it has no cache to stay in, and
    takes those of a tensor at once."""
    launches = work.operations * ceil(max(tensors, 1))
    return cost.operation_s(Operation(kind="memory", nbytes=work.nbytes * elements, launches=launches), "gpu")
