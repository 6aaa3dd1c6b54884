"""The frozen plan of a layout, for people and for reports."""

from __future__ import annotations

from typing import Any

from ..scheduler.experts.forecast import ExpertForecast
from ..scheduler.plan import Home, Links, Plan, PlannedBlock
from .layout import Budgets, Layout


def make_plan(
    layout: Layout,
    device: str,
    budgets: Budgets,
    links: Links,
    weights_nbytes: int,
    notes: tuple[str, ...] = (),
    *,
    exact: bool = False,
    exact_cost_s: float | None = None,
    experts: ExpertForecast | None = None,
    experts_shared: bool = False,
) -> Plan:
    """What a layout means, in the plan's words.

    Args:
        experts: What those that are blocks of their own will miss; None where they are not.
        experts_shared: Whether the CPU may compute some of them beside a device apart.
        exact: Whether results must not depend on which processor computes: nothing is on the CPU then.
        exact_cost_s: Seconds per sweep that this costs, or would cost; None where it is not known.
    """
    blocks = []
    for block in layout.blocks:
        home: Home = "disk"
        if block.id in layout.front.resident:
            home = "device" if layout.back else "host"
        elif layout.back and block.id in layout.back.resident:
            home = "host"
        blocks.append(
            PlannedBlock(
                id=block.id,
                name=block.name,
                nbytes=block.image.data_nbytes,
                slot_nbytes=block.front_nbytes,
                home=home,
                processor="cpu" if layout.on_cpu.get(block.id) else "device",
                cpu_rows_below=layout.on_cpu.get(block.id, 0),
            )
        )
    return Plan(
        device=device,
        emulated=device == "emulated",
        resident=layout.resident,
        weights_nbytes=weights_nbytes,
        blocks=tuple(blocks),
        tables=tuple(layout.tables),
        host_nbytes=layout.host_nbytes,
        host_budget_nbytes=budgets.host,
        device_nbytes=layout.device_nbytes,
        device_budget_nbytes=budgets.device,
        slots=layout.front.slots,
        slot_nbytes=layout.front.slot_nbytes,
        host_slots=layout.back.slots if layout.back else 0,
        host_slot_nbytes=layout.back.slot_nbytes if layout.back else 0,
        limit_nbytes=layout.limit_nbytes,
        **_experts_of(layout, experts),
        link_nbytes_per_sweep=_link(layout, experts) - _not_copied(layout),
        links=links,
        depth=max(layout.front.slots - 1, 0),
        notes=(
            *notes,
            *_seldom(layout),
            *_expert_notes(layout, experts, shared=experts_shared),
            *_processors(layout, exact, exact_cost_s),
        ),
    )


def _experts_of(layout: Layout, foreseen: ExpertForecast | None) -> dict[str, Any]:
    """The plan's fields about experts, and the bytes that are read per sweep."""
    placed = layout.experts
    if placed is None:
        return {"disk_nbytes_per_sweep": layout.disk_nbytes}
    alike = round(placed.read_per_token)
    read = alike if foreseen is None else round(foreseen.read_nbytes)
    return {
        "expert_slots": placed.capacity,
        "expert_passing": placed.passing,
        "expert_host_slots": 0 if placed.host_has_all else placed.host_capacity,
        "expert_nbytes": placed.each_nbytes,
        "expert_blocks": len(layout.blocks) - placed.first,
        "expert_read_nbytes": read,
        "expert_uses": 0.0 if foreseen is None else foreseen.uses,
        "expert_misses": 0.0 if foreseen is None else foreseen.missed,
        "expert_hits": {} if foreseen is None else {cause: each for cause, each in foreseen.hits.items() if each},
        "expert_copied_nbytes": 0 if foreseen is None else round(foreseen.copied_nbytes),
        "disk_nbytes_per_sweep": layout.disk_nbytes - alike + read,
    }


def _link(layout: Layout, foreseen: ExpertForecast | None) -> int:
    """Bytes copied to a device apart per sweep."""
    if layout.back is None or layout.experts is None or foreseen is None:
        return layout.link_nbytes
    alike = sum(layout.per_token(b) * b.image.data_nbytes for b in layout.streamed() if layout.is_expert(b))
    return round(layout.link_nbytes - alike + foreseen.copied_nbytes)


def _not_copied(layout: Layout) -> int:
    """Bytes that are computed where they lie in a call of one token."""
    here = [block for block in layout.streamed() if layout.on_cpu.get(block.id, 0) > 1]
    return sum(layout.uses.get(block.id, 1) * block.image.data_nbytes for block in here) if layout.back else 0


def _processors(layout: Layout, exact: bool, cost_s: float | None) -> tuple[str, ...]:
    """A note on what two processors mean for results, or one processor for time."""
    more = "" if cost_s is None else f", {cost_s:.3g} s more per sweep"
    if layout.on_cpu:
        return (
            "where the CPU computes, results equal the device's to rounding, not to the bit; exact=True keeps one "
            f"processor{more}",
        )
    return (f"exact=True keeps one processor{more}",) if exact and cost_s else ()


def _expert_notes(layout: Layout, foreseen: ExpertForecast | None, *, shared: bool) -> tuple[str, ...]:
    """Notes on what experts have to do with bytes per sweep."""
    experts = layout.experts
    if experts is None:
        return ()
    brought = "copied" if experts.apart else "read"
    notes = [
        f"{experts.routing.total} experts, {experts.routing.layers * experts.routing.top_k} of them per token: "
        f"{experts.capacity} are kept, others are {brought} when a router asks for them"
    ]
    if foreseen is None:
        notes.append(
            f"a sweep is counted as one token of {experts.read_per_token / 2**20:.0f} MiB of experts, as if all were "
            "used alike: with preferences it is less, with more tokens more"
        )
    else:
        routing = "made-up routing, with skew as of a typical model" if foreseen.assumed else foreseen.source
        notes.append(
            f"foreseen from {routing}: per step {foreseen.uses:.1f} experts are used and {foreseen.missed:.1f} missed, "
            f"{foreseen.read_nbytes / 2**20:.0f} MiB read from disk, {foreseen.copied_nbytes / 2**20:.0f} MiB copied"
        )
    if shared:
        notes.append(
            "where the CPU computes experts, results equal the device's to rounding, not to the bit; exact=True keeps "
            "one processor"
        )
    return tuple(notes)


def _seldom(layout: Layout) -> tuple[str, ...]:
    """A note on what is read once per answer only, where there is such a thing."""
    nbytes = sum(block.image.read_nbytes for block in layout.on_disk() if block.id in layout.seldom)
    if not nbytes:
        return ()
    return (f"{nbytes / 2**20:.0f} MiB of what is read belong to parts that run once per answer: tokens read less",)


def untouched_plan(device: str, budgets: Budgets, weights_nbytes: int, note: str) -> Plan:
    """The plan of a module that was left exactly as it was."""
    return Plan(
        device=device,
        emulated=device == "emulated",
        resident=True,
        weights_nbytes=weights_nbytes,
        blocks=(),
        tables=(),
        host_nbytes=0,
        host_budget_nbytes=budgets.host,
        device_nbytes=0,
        device_budget_nbytes=budgets.device,
        slots=0,
        slot_nbytes=0,
        host_slots=0,
        host_slot_nbytes=0,
        limit_nbytes=0,
        disk_nbytes_per_sweep=0,
        link_nbytes_per_sweep=0,
        links=Links(),
        depth=0,
        notes=(note,),
    )
