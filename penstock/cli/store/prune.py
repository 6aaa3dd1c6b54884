"""`penstock store prune`: give back what the last commit does not need."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from ...memory.errors import UsageError
from ...sizes import format_size, parse_size
from ..options import Json
from ..output import Output
from .inputs import Drives, Kept, refuse_drives, store_folders
from .prefixes import is_prefixes, show_prune


def prune(
    run: Kept,
    drives: Drives = None,
    capacity: Annotated[
        str | None, typer.Option(help="Of a prefix store: a new capacity, from now on, such as 5GiB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give back to the drive what the last commit does not need: about half, for a run that is finished.

    The run can still be exported, and go on: then it takes the room again, if the drive still has it. Only the commit
    before the last, kept in case the last one's manifest is damaged, is given up.

    Of a prefix store: remove what nobody can find any more, and what exceeds the capacity.
    """
    from ...memory.store import prune as prune_store

    output = Output()
    if is_prefixes(run):
        refuse_drives(run, drives)
        show_prune(run, None if capacity is None else parse_size(capacity), output, as_json=as_json)
        return
    if capacity is not None:
        raise UsageError(f"{run} is a run, whose size is given by what it trains: leave --capacity out")
    with output.busy(f"pruning {run}"):
        report = prune_store(store_folders(run, drives))
    if as_json:
        output.write_json(dataclasses.asdict(report))
        return
    removed = ", ".join(os.path.basename(path) for path in report.removed)
    files = f", and removed {removed}" if removed else ""
    output.data.print(
        f"gave {format_size(report.freed_nbytes)} back{files}; commit {report.commit} stays",
        markup=False,
        soft_wrap=True,
    )
