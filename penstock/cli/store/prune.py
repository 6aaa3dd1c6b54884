"""`penstock store prune`: give back what the last commit does not need."""

from __future__ import annotations

import dataclasses
import os

from ...sizes import format_size
from ..options import Json
from ..output import Output
from .inputs import Drives, Run, store_folders


def prune(run: Run, drives: Drives = None, as_json: Json = False) -> None:
    """Give back to the drive what the last commit does not need: about half, for a run that is finished.

    The run can still be exported, and go on: then it takes the room again, if the drive still has it. Only the commit
    before the last, kept in case the last one's manifest is damaged, is given up.
    """
    from ...memory.store import prune as prune_store

    output = Output()
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
