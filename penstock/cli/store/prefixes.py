"""`penstock store stats|verify|prune` of a prefix store: keys and values of prompts, instead of a run's blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from ...sizes import format_size
from ..output import Output
from ..prof.plain import plain

BAD: Final = 1
"""Exit code where something is not what was stored."""


def is_prefixes(folder: Path) -> bool:
    """Whether a folder is a prefix store."""
    from ...memory.prefix import is_prefix_store

    return is_prefix_store(folder)


def show_stats(folder: Path, output: Output, *, as_json: bool) -> None:
    """How much is stored, of how much there may be."""
    from ...memory.prefix import stats

    found = stats(folder)
    if as_json:
        output.write_json(found)
        return
    rows = [
        ("folder", found.folder),
        ("stored", f"{found.tokens} tokens in {found.blocks} blocks, {format_size(found.payload_nbytes)}"),
        ("models", f"{found.identities}"),
        (
            "on disk",
            f"{format_size(found.used_nbytes)} of {format_size(found.capacity_nbytes)}, {found.segments} files",
        ),
    ]
    if found.unreachable_segments or found.left_over_files:
        rows.append(
            (
                "prune",
                f"{found.unreachable_segments} files follow a block that is gone, {found.left_over_files} were left by "
                "a process that was killed, or are being written",
            )
        )
    if found.bad_segments:
        rows.append(("bad", f"{found.bad_segments} files cannot be read: penstock store verify {folder}"))
    for name, value in rows:
        output.data.print(plain(f"{name.ljust(7)} {value}"), markup=False, soft_wrap=True)


def show_verify(folder: Path, output: Output, *, as_json: bool) -> int | None:
    """Read all of it; exit code 1 if something is bad."""
    from ...memory.prefix import verify

    with output.busy(f"reading {folder}"):
        report = verify(folder)
    if as_json:
        output.write_json({**dataclasses.asdict(report), "good": report.good})
    else:
        read = f"{report.blocks} blocks in {report.segments} files, {format_size(report.nbytes)}"
        lines = [
            f"bad: {format_size(bad.nbytes) if bad.nbytes else 'the header'} at offset {bad.offset} of {bad.path}: "
            f"{bad.reason}"
            for bad in report.bad
        ]
        if lines:
            lines.append(
                f"{len(lines)} bad among {read}: what is bad is computed again and never used; look at `dmesg` and the "
                "drive's health"
            )
        for line in lines or [f"ok: {read}"]:
            output.data.print(plain(line), markup=False, soft_wrap=True)
    return None if report.good else BAD


def show_prune(folder: Path, capacity_nbytes: int | None, output: Output, *, as_json: bool) -> None:
    """Remove what nobody can find, and what exceeds the capacity."""
    from ...memory.prefix import prune

    with output.busy(f"pruning {folder}"):
        report = prune(folder, capacity_nbytes)
    if as_json:
        output.write_json(report)
        return
    output.data.print(
        f"gave {format_size(report.freed_nbytes)} back: {report.removed_segments} files of blocks, "
        f"{report.left_over_files} left over; {format_size(report.used_nbytes)} of "
        f"{format_size(report.capacity_nbytes)} stay in use",
        markup=False,
        soft_wrap=True,
    )
