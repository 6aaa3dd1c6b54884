"""HybriMoE's schedule of a layer (arXiv 2504.05897, section 4.2): whichever timeline would end first takes the next
expert.

The device takes what is there, the one with most rows first. The link brings the one with most rows that is not there.
The CPU takes the one with fewest rows that is not there, and when there is none left, the one with fewest rows that is.
"""

from __future__ import annotations

from collections.abc import Sequence

from .costs import ExpertCosts
from .timelines import ExpertTask


def greedy_assignment(tasks: Sequence[ExpertTask], costs: ExpertCosts) -> tuple[bool, ...]:
    """By task, whether the CPU computes it. What is on disk is read, in the order in which it is taken, by a fourth
    timeline that HybriMoE does not have."""
    device_s = costs.device_s
    assert device_s is not None, "without a device the CPU computes everything"
    ascending = sorted(range(len(tasks)), key=lambda number: tasks[number].rows)
    there = [number for number in ascending if tasks[number].on_device]
    away = [number for number in ascending if not tasks[number].on_device]
    arrived: dict[int, float] = {}
    """When what was brought is there."""
    on_cpu = [False] * len(tasks)
    cpu, device, link, disk = costs.cpu_start_s, 0.0, 0.0, 0.0

    def in_host(number: int) -> float:
        return 0.0 if tasks[number].on_host else disk + costs.read_s

    while there or away:
        offers: list[tuple[float, str, int]] = []
        if there:
            head = there[-1]
            offers.append((max(device, arrived.get(head, 0.0)) + device_s(tasks[head].rows), "device", head))
        if away:
            offers.append((max(link, in_host(away[-1])) + costs.copy_s, "link", away[-1]))
        # What is on the device alone would have to be read for the CPU: never worth it.
        small = away[0] if away else next((n for n in there if tasks[n].on_host and n not in arrived), None)
        if small is not None:
            offers.append((max(cpu, in_host(small)) + costs.cpu_s(tasks[small].rows), "cpu", small))
        end, who, number = min(offers)
        if who != "device" and not tasks[number].on_host:
            disk += costs.read_s
        if who == "device":
            device = end
            there.remove(number)
        elif who == "link":
            link = arrived[number] = end
            away.remove(number)
            there.append(number)
            there.sort(key=lambda each: tasks[each].rows)
        else:
            cpu, on_cpu[number] = end, True
            (away if number in away else there).remove(number)
    return tuple(on_cpu)
