"""`penstock store verify`: read a store back and compare checksums."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from ...sizes import format_size
from ..options import Json
from ..output import Output
from ..prof.plain import plain
from .inputs import Drives, Kept, refuse_drives, store_folders
from .prefixes import is_prefixes, show_verify

if TYPE_CHECKING:
    from ...memory.store import VerifyReport

BAD: Final = 1
"""Exit code where a block is not what was committed."""


def verify(run: Kept, drives: Drives = None, as_json: Json = False) -> int | None:
    """Read every block of the last commit and compare its checksum: exit code 0 if all are good, 1 if not.

    Of a prefix store, all blocks. Names each block that is bad. Changes nothing and takes no lock: the run may be going
    on meanwhile.
    """
    from ...memory.store import verify as verify_store

    output = Output()
    if is_prefixes(run):
        refuse_drives(run, drives)
        return show_verify(run, output, as_json=as_json)
    with output.busy(f"reading {run}"):
        report = verify_store(store_folders(run, drives))
    if as_json:
        output.write_json({**dataclasses.asdict(report), "good": report.good})
    else:
        for line in _lines(report):
            output.data.print(plain(line), markup=False, soft_wrap=True)
    return None if report.good else BAD


def _lines(report: VerifyReport) -> list[str]:
    read = f"{report.blocks} blocks of commit {report.commit}, {format_size(report.nbytes)}"
    lines = [
        f"bad: block {bad.block} ({bad.kind} {bad.name!r}), {format_size(bad.nbytes)} at offset {bad.offset} of "
        f"{bad.path}: {bad.reason}"
        for bad in report.bad
    ]
    if report.doubt:
        lines.append(f"bad: {report.doubt}; commit {report.commit}, the one before, was read in its place")
    if report.bad:
        lines.append(
            f"{len(report.bad)} of {read} are bad: look at `dmesg` and the drive's health, and bring the run back from "
            "a copy"
        )
    return lines or [f"ok: {read}"]
