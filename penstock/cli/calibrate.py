"""`penstock calibrate`: how fast this machine is, kept for plans."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.status import Status

from ..memory.errors import CalibrationError, UsageError
from .options import MACHINE, Json
from .output import Output

if TYPE_CHECKING:
    from ..runtime.calibration.cache import CalibrationCache, Kept
    from ..runtime.devices.base import Device
    from ..scheduler.calibration import Calibration


def calibrate(
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, emulated:h2d=1GiB/s,…", rich_help_panel=MACHINE)
    ] = "auto",
    disk: Annotated[
        list[Path] | None,
        typer.Option(help="Folder on a drive to measure; again for more. Default: the cache.", rich_help_panel=MACHINE),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In 5 seconds instead of 15: coarser.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again though what is kept still holds.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing: show what is kept, stale or not.")] = False,
    as_json: Json = False,
) -> None:
    """Measure drives, links, memory and processors, as curves, and keep the result for plans.

    Takes about 15 seconds, up to 512 MiB of memory, and 256 MiB of each drive, which are given back; up to a GiB is
    written to each. End other programs before: what they take is missing in the figures. A calibration that is kept and
    still holds is shown, not made again.

    Example: penstock calibrate --device cuda:0 --disk /nvme0/scratch --disk /nvme1/scratch
    """
    if show and (force or quick or disk):
        raise UsageError("--show measures nothing: leave out --force, --quick and --disk")
    output = Output()
    with output.busy("starting"):
        from ..caches import calibration_cache  # torch takes seconds
        from ..devices import open_device
    folders = [str(folder) for folder in disk or ()]
    cache = calibration_cache()
    opened = open_device(device)
    try:
        kept = cache.read(opened)
        for reason in kept.reasons:
            output.notes.print(f"stale: {reason}", style="yellow", markup=False)
        if show and kept.calibration is None:
            raise CalibrationError(
                f"no calibration for {opened.name} is kept in {kept.path}: run `penstock calibrate --device {device}`"
            )
        usable = kept.calibration if show else kept.trusted
        if usable is not None and not force and _covers(usable, folders, quick):
            _show(output, usable, as_json)
            again = "" if show else "; --force measures again"
            output.notes.print(f"kept in {kept.path} since {usable.date}, {_age(usable)}{again}", markup=False)
            return
        _measure(output, opened, cache, kept, folders, quick=quick, as_json=as_json)
    finally:
        opened.close()


def _measure(
    output: Output,
    device: Device,
    cache: CalibrationCache,
    kept: Kept,
    folders: list[str],
    *,
    quick: bool,
    as_json: bool,
) -> None:
    from ..runtime.calibration.calibrate import calibrate as measure

    def tell(part: str) -> None:
        if isinstance(status, Status):
            status.update(f"measuring: {part} …")

    with output.busy("measuring") as status:
        calibration = measure(device, folders, quick=quick, progress=tell)
    _show(output, calibration, as_json)
    path = cache.write(calibration, device)
    where = "kept again in" if kept.calibration is not None else "kept in"
    how = ", quickly" if quick else ""
    output.notes.print(f"measured in {calibration.seconds:.1f} s{how}; {where} {path}", markup=False)


def _covers(calibration: Calibration, folders: list[str], quick: bool) -> bool:
    """Whether what was measured has all that is asked for."""
    if calibration.quick and not quick:
        return False
    from ..memory.capacity import disk_capacity
    from ..runtime.calibration.fingerprint import identify_drive

    wanted = (identify_drive(disk_capacity(folder).folder) for folder in folders)
    known = {drive.device for drive in calibration.fingerprint.drives}
    return all(drive is not None and drive.device in known for drive in wanted)


def _age(calibration: Calibration) -> str:
    hours = (time.time() - calibration.taken_unix_s) / 3600
    return f"{hours / 24:.0f} days old" if hours >= 48 else f"{max(hours, 0):.0f} hours old"


def _show(output: Output, calibration: Calibration, as_json: bool) -> None:
    from ..scheduler.calibration import encode_calibration
    from .calibration_table import calibration_lines

    if as_json:
        print(encode_calibration(calibration).decode())
    else:
        for line in calibration_lines(calibration):
            output.data.print(line, soft_wrap=True)
    for note in calibration.notes:
        output.notes.print(f"note: {note}", style="yellow", markup=False)
