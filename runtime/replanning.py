"""A plan that comes from a file: is it of this model, can it be carried out, and where does it let blocks live?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..memory.errors import DoesNotFitError, UsageError
from ..scheduler.plan import Home, Plan
from ..scheduler.residency import Residency
from .layout import Budgets, Draft, Layout


def check_tables(plan: Plan, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a plan that has tables which the model has not got.

    Raises:
        UsageError: it does; the message names one.
    """
    for name in plan.tables:
        if name not in parameters or parameters[name].dim() != 2:
            raise UsageError(f"the plan has {name} read by rows, which this model has not got: it is for another model")


def check_same(plan: Plan, blocks: Sequence[Draft]) -> None:
    """Refuse a plan whose blocks are not those of the model.

    Raises:
        UsageError: they are not; the message names the first that differs.
    """
    if len(plan.blocks) != len(blocks):
        raise UsageError(
            f"the plan has {len(plan.blocks)} blocks, this model has {len(blocks)} with the plan's limit_nbytes of "
            f"{plan.limit_nbytes}: it is a plan for another model. Make one for this model, and change only homes, "
            f"slots and processors"
        )
    for planned, block in zip(plan.blocks, blocks, strict=True):
        theirs, ours = (planned.id, planned.name, planned.nbytes), (block.id, block.name, block.image.data_nbytes)
        if theirs != ours:
            raise UsageError(
                f"block {planned.id} of the plan is {planned.name} of {planned.nbytes} bytes, and of this model "
                f"{block.name} of {block.image.data_nbytes}: it is a plan for another model, or another dtype"
            )


def residencies(plan: Plan, blocks: Sequence[Draft], *, separate: bool) -> tuple[Residency, Residency | None]:
    """What stays on each tier by the plan, and the rings.

    Raises:
        UsageError: it is a plan for another kind of device, or has a block computed where it is not.
    """
    if separate is (plan.device_budget_nbytes is None):
        kind = "with a device of its own" if plan.device_budget_nbytes is not None else "where host and device are one"
        raise UsageError(f"the plan is for a machine {kind} ({plan.device}): make one for this device")
    homes = {block.id: block.home for block in plan.blocks}
    for planned in plan.blocks:
        if planned.home == "device" and not separate:
            raise UsageError(
                f"block {planned.id} ({planned.name}) is to live on the device, and there is none: use host"
            )
        if planned.cpu_rows_below and planned.home != "host":
            raise UsageError(
                f"block {planned.id} ({planned.name}) is to be computed on the CPU, and lives on the {planned.home}: "
                f"give it the home host"
            )
    first: Home = "device" if separate else "host"
    front = _residency(
        {block.id: block.front_nbytes for block in blocks},
        frozenset(block for block, home in homes.items() if home == first),
        plan.slots,
        plan.slot_nbytes,
    )
    if not separate:
        return front, None
    back = _residency(
        {block.id: block.image.nbytes for block in blocks},
        frozenset(block for block, home in homes.items() if home == "host"),
        plan.host_slots,
        plan.host_slot_nbytes,
    )
    return front, back


def _residency(nbytes: Mapping[int, int], kept: frozenset[int], slots: int, slot_nbytes: int) -> Residency:
    return Residency(
        resident=kept,
        slot_nbytes=slot_nbytes,
        slots=slots,
        resident_nbytes=sum(nbytes[block] for block in kept),
        streamed_nbytes=sum(size for block, size in nbytes.items() if block not in kept),
    )


def check_fits(layout: Layout, budgets: Budgets, *, min_slots: int) -> None:
    """Refuse a layout that could not run, or that takes more than there is.

    Raises:
        UsageError: a streamed block is larger than the slots, or there are too few.
        DoesNotFitError: it takes more than a budget.
    """
    _check_ring("slots", layout.front, {b.id: b.front_nbytes for b in layout.streamed()}, min_slots)
    if layout.back is not None:
        passing = {b.id: b.image.nbytes for b in layout.blocks if b.id not in layout.back.resident}
        _check_ring("host_slots", layout.back, passing, 2)
    for tier, needed, budget in (
        ("host", layout.host_nbytes, budgets.host),
        ("device", layout.device_nbytes, budgets.device),
    ):
        if budget is not None and needed > budget:
            raise DoesNotFitError(
                f"the plan takes {needed} bytes of {tier} memory, and the budget is {budget}: let fewer blocks live "
                f"there, or raise it, max_memory={{{tier!r}: {needed}}}",
                tier=tier,
                needed_nbytes=needed,
                available_nbytes=budget,
            )


def _check_ring(name: str, ring: Residency, passing: Mapping[int, int], least: int) -> None:
    if not passing:
        return
    if ring.slots < least:
        raise UsageError(
            f"the plan has {ring.slots} {name}: {least} are needed at least, for blocks in use and to come"
        )
    block, nbytes = max(passing.items(), key=lambda item: item[1])
    if nbytes > ring.slot_nbytes:
        raise UsageError(
            f"block {block} takes {nbytes} bytes of a slot, and the plan's {name} have {ring.slot_nbytes}: let the "
            f"block stay, or make them larger"
        )
