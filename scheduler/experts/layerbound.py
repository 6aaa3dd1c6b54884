"""The least time that a layer can take with an assignment, whatever the order: what its busiest resource has to do."""

from __future__ import annotations

from collections.abc import Sequence

from .costs import ExpertCosts
from .timelines import ExpertTask, needs_read


def least_s(tasks: Sequence[ExpertTask], costs: ExpertCosts, on_cpu: Sequence[bool]) -> float:
    """Seconds below which no order gets, sharing of memory left out: it makes everything slower only."""
    cpu = device = 0.0
    copies = reads = 0
    shortest_copied = shortest_read = float("inf")
    for task, by_cpu in zip(tasks, on_cpu, strict=True):
        if by_cpu:
            tail = seconds = costs.cpu_s(task.rows)
            cpu += seconds
        else:
            assert costs.device_s is not None, "without a device the CPU computes everything"
            seconds = costs.device_s(task.rows)
            device += seconds
            tail = seconds
            if not task.on_device:
                copies += 1
                shortest_copied = min(shortest_copied, seconds)
                tail += costs.copy_s
        if needs_read(task, by_cpu):
            reads += 1
            shortest_read = min(shortest_read, tail)
    bound = max(cpu + costs.cpu_start_s if cpu else 0.0, device)
    if copies:
        bound = max(bound, copies * costs.copy_s + shortest_copied)
    if reads:
        bound = max(bound, reads * costs.read_s + shortest_read)
    return bound
