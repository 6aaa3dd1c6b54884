"""A plan that comes from a file: is it of this model, can it be carried out, and where does it let blocks live?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from ..memory.errors import DoesNotFitError, UsageError
from ..scheduler.plan import Home, Plan
from ..scheduler.residency import Residency
from .experts.placed import PlacedExperts
from .layout import Budgets, Draft, Layout

MOST_PIECES: Final = 4096
"""Of a table. The planner's own limits are sizes of whole layers and matrices, of which there are fewer."""
PADDING_NBYTES: Final = 64 * 2**10
"""By so much a block may take more of a slot than a plan from a config alone says."""


def check_tables(plan: Plan, parameters: Mapping[str, nn.Parameter], row_nbytes: Mapping[str, int]) -> None:
    """Refuse a plan that has tables which the model has not got, or cuts them into dust.

    Args:
        plan: From a file.
        parameters: Of the model.
        row_nbytes: Of a row of each parameter that would be cut into pieces of rows.

    Raises:
        UsageError: it does; the message names one.
    """
    if plan.blocks and plan.limit_nbytes < 1:
        raise UsageError(f"the plan's limit_nbytes is {plan.limit_nbytes}: it is what parameters are cut by, 1 or more")
    for name in plan.tables:
        if name not in parameters or parameters[name].dim() != 2:
            raise UsageError(f"the plan has {name} read by rows, which this model has not got: it is for another model")
        rows = parameters[name].shape[0]
        pieces = -(-rows // max(1, plan.limit_nbytes // row_nbytes[name])) if name in row_nbytes else 0
        if pieces > MOST_PIECES:
            least = -(-rows // MOST_PIECES) * row_nbytes[name]
            raise UsageError(
                f"the plan's limit_nbytes of {plan.limit_nbytes} would cut {name}, {rows} rows of {row_nbytes[name]} "
                f"bytes, into {pieces} blocks, and {MOST_PIECES} are the most: leave it as the plan was made, or give "
                f"{least} or more"
            )


def check_same(plan: Plan, blocks: Sequence[Draft]) -> None:
    """Refuse a plan whose blocks are not those of the model.

    Raises:
        UsageError: they are not; the message names the first that differs.
    """
    if not plan.blocks:
        raise UsageError("the plan has no blocks: it is of a module that was left as it was, and cannot be carried out")
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


def check_experts(plan: Plan, experts: PlacedExperts | None) -> None:
    """Refuse a plan that has experts where they cannot be.

    Raises:
        UsageError: some are to stay and others not, more are to be kept than there are, or some fit no slot.
    """
    if experts is None:
        return
    homes = {block.home: block for block in plan.blocks[experts.first :]}
    kept = "host" if experts.apart else "disk"
    for home, block in homes.items():
        if home not in ("disk", kept) or len(homes) > 1:
            raise UsageError(
                f"block {block.id} ({block.name}) is to live on the {home}, and is an expert: which of those are "
                "kept is decided while the model runs. Give all of them the home disk"
                f"{' or host' if experts.apart else ''}, and change expert_slots"
            )
    total = experts.routing.total
    if max(plan.expert_slots, plan.expert_passing, plan.expert_host_slots) > total:
        raise UsageError(
            f"the plan has expert_slots of {plan.expert_slots}, expert_host_slots of {plan.expert_host_slots} and "
            f"expert_passing of {plan.expert_passing}: this model has {total} experts"
        )
    largest = max(experts.host_slot_nbytes, default=0)
    if "disk" in homes and (plan.host_slot_nbytes < largest or (experts.apart and not plan.host_slots)):
        raise UsageError(
            f"the plan has {plan.host_slots} host slots of {plan.host_slot_nbytes} bytes, and experts of {largest} "
            "bytes pass through them: raise host_slot_nbytes"
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
        if (planned.processor == "cpu") is not bool(planned.cpu_rows_below):
            raise UsageError(
                f"block {planned.id} ({planned.name}) is for the {planned.processor} with cpu_rows_below "
                f"{planned.cpu_rows_below}: give a block of the CPU the rows below which it computes, and others 0"
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


def check_rings(
    blocks: Sequence[Draft], front: Residency, back: Residency | None, *, min_slots: int
) -> tuple[Residency, Residency | None]:
    """The rings of a plan, their slots a little larger where that is what blocks take.

    A plan that was made from a config does not know where tensors lie in files: a block may take some pages more.

    Raises:
        UsageError: a streamed block is larger than the slots, or there are too few.
    """
    front = _ring("slot", front, {b.id: b.front_nbytes for b in blocks if b.id not in front.resident}, min_slots)
    if back is None:
        return front, None
    passing = {b.id: b.image.nbytes for b in blocks if b.id not in back.resident}
    return front, _ring("host_slot", back, passing, 2)


def _ring(name: str, ring: Residency, passing: Mapping[int, int], least: int) -> Residency:
    if not passing:
        return ring
    if ring.slots < least:
        raise UsageError(
            f"the plan has {ring.slots} {name}s: {least} are needed at least, for blocks in use and to come"
        )
    block, nbytes = max(passing.items(), key=lambda item: item[1])
    if nbytes > ring.slot_nbytes + PADDING_NBYTES:
        raise UsageError(
            f"block {block} takes {nbytes} bytes of a slot, and the plan's {name}s have {ring.slot_nbytes}: let the "
            f"block stay, or make {name}_nbytes larger"
        )
    return replace(ring, slot_nbytes=max(ring.slot_nbytes, nbytes))


def check_fits(layout: Layout, budgets: Budgets) -> None:
    """Refuse a layout that takes more than there is.

    Raises:
        DoesNotFitError: it takes more than a budget.
    """
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
