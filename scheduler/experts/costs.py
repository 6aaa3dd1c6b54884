"""What experts cost on a machine: reading one, copying one, and computing it with so many rows on either processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from ...memory.requests import CHUNK, request_nbytes
from ..cost import CostModel
from ..hardware import Sharing
from .shape import ExpertShape

SecondsOfRows = Callable[[int], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCosts:
    """Seconds of one expert. What shares memory slows each other by `sharing`, as in the simulator of whole runs."""

    cpu_s: SecondsOfRows
    """Computed by the CPU from host memory, with so many rows; what crosses for these rows is included."""
    device_s: SecondsOfRows | None
    """Computed by the device from its memory; None where there is none, and then the CPU computes everything."""
    copy_s: float = 0.0
    """Host memory to device memory."""
    read_s: float = 0.0
    """Disk to host memory."""
    cpu_start_s: float = 0.0
    """Before the CPU's first expert of a layer, once: activations on their way there, and results back."""
    sharing: Sharing = field(default_factory=Sharing)

    @property
    def separate(self) -> bool:
        """Whether there is a device with a memory of its own."""
        return self.device_s is not None


def expert_costs(cost: CostModel, shape: ExpertShape) -> ExpertCosts:
    """The costs of experts of a shape, from a machine's curves."""
    hardware = cost.hardware
    link = hardware.link

    @cache
    def cpu_s(rows: int) -> float:
        crossing = 0.0
        if link is not None:
            nbytes = rows * shape.row_nbytes
            # In bandwidth only: all experts of a layer cross together, and wait for the link once (cpu_start_s).
            crossing = nbytes / link.h2d.best + nbytes / link.d2h.best
        return crossing + cost.compute_s(shape.operations(rows), "cpu")

    @cache
    def device_s(rows: int) -> float:
        return cost.compute_s(shape.operations(rows), "gpu")

    return ExpertCosts(
        cpu_s=cpu_s,
        device_s=device_s if link is not None else None,
        copy_s=cost.copy_s(shape.nbytes, min(shape.nbytes, CHUNK)),
        read_s=cost.read_s(shape.nbytes, request_nbytes(shape.nbytes)) if hardware.drives else 0.0,
        cpu_start_s=2 * link.latency_s if link is not None else 0.0,
        sharing=hardware.sharing,
    )
