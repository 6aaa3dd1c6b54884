"""Plans as files: JSON, to be read, edited and given back."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ..memory.errors import DiskError, UsageError
from .plan import Plan

FORMAT = "penstock plan 1"
MOST_NBYTES = 64 * 2**20


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    plan: Plan


def write_plan(path: str | os.PathLike[str], plan: Plan, *, force: bool = False) -> None:
    """Write a plan as JSON.

    Raises:
        UsageError: there is something at `path`, and `force` is false.
        DiskError: the file cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(_File(format=FORMAT, plan=plan)), indent=1)
    try:
        with open(path, "wb" if force else "xb") as file:
            file.write(text + b"\n")
    except FileExistsError as error:
        raise UsageError(f"{os.fspath(path)} exists. Choose another file, or replace it with --force") from error
    except OSError as error:
        raise DiskError(f"{os.fspath(path)} cannot be written: {error.strerror}. Choose another file.") from error


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """A plan from a file.

    Raises:
        UsageError: it cannot be read, or is no plan of this version; the message says what is wrong where.
    """
    name, file = os.fspath(path), Path(path)
    try:
        if file.stat().st_size > MOST_NBYTES:
            raise UsageError(f"{name} has {file.stat().st_size} bytes: that is no plan")
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as error:
        raise UsageError(f"{name} is no plan that this version can read: {error}") from error
    if found.format != FORMAT:
        raise UsageError(f"{name} is a {found.format!r}; this version reads {FORMAT!r}: make the plan again")
    _check(name, found.plan)
    return found.plan


def _check(name: str, plan: Plan) -> None:
    numbers = [block.id for block in plan.blocks]
    if numbers != list(range(len(numbers))):
        raise UsageError(f"{name}: the blocks must be numbered 0, 1, 2, … in this order; homes may change, not blocks")
    figures = {"slots": plan.slots, "slot_nbytes": plan.slot_nbytes, "host_slots": plan.host_slots}
    figures |= {"host_slot_nbytes": plan.host_slot_nbytes, "limit_nbytes": plan.limit_nbytes}
    figures |= {"expert_slots": plan.expert_slots, "expert_passing": plan.expert_passing}
    figures |= {"expert_host_slots": plan.expert_host_slots}
    figures |= {f"cpu_rows_below of block {block.id}": block.cpu_rows_below for block in plan.blocks}
    for what, value in figures.items():
        if not 0 <= value < 2**63:
            raise UsageError(f"{name}: {what} is {value}: it must be 0 or more")
