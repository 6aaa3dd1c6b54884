"""`penstock doctor`: what this machine has, what is missing, what each tier can give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..memory.errors import UsageError
from ..memory.scratch import default_root
from ..sizes import format_size
from .calibrations import CalibrationState, kept_calibration
from .findings import Finding, find_missing
from .links import measure_links
from .machine import Machine, examine
from .options import Json
from .output import Output


@dataclass(frozen=True, kw_only=True, slots=True)
class TierCapacity:
    """What a tier can give now."""

    tier: str
    nbytes: int
    where: str
    """What the bytes lie in, for people."""


def doctor(
    disk: Annotated[
        Path | None, typer.Option("--disk", help="Folder to examine for scratch files. Default: the user's cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what this machine has, what is missing, what each tier can give and how fast each link is.

    Takes a few seconds and 256 MiB of the disk, which are given back.
    """
    output = Output()
    folder, refused = _folder(disk)
    with output.busy("measuring"):
        machine = examine(folder, measure_links=measure_links)
        kept = kept_calibration() if machine.software.torch else None
    findings = find_missing(machine)
    if refused is not None and not machine.disk.in_memory:
        findings = (refused, *findings)
    tiers = tier_capacities(machine)
    if as_json:
        output.write_json({**_fields(machine), "tiers": tiers, "missing": findings, "calibration": kept})
        return
    for line in render(machine, tiers, findings, kept):
        output.data.print(line)


def tier_capacities(machine: Machine) -> tuple[TierCapacity, ...]:
    """Bytes that each tier can give now. Without a GPU there is no `device`: it is the same as `host`."""
    devices = [
        TierCapacity(tier="device", nbytes=device.free_nbytes, where=f"cuda:{device.index} {device.name}")
        for device in machine.devices
    ]
    host = TierCapacity(
        tier="host", nbytes=machine.host.available_nbytes, where=f"RAM, bounded by {machine.host.available_source}"
    )
    disk = TierCapacity(
        tier="disk", nbytes=machine.disk.free_nbytes, where=f"{machine.disk.folder} ({machine.disk.filesystem})"
    )
    return (*devices, host, disk)


def render(
    machine: Machine,
    tiers: tuple[TierCapacity, ...],
    findings: tuple[Finding, ...],
    calibration: CalibrationState | None = None,
) -> list[Text]:
    """The report as lines for people."""
    lines = [_heading("This machine"), *(_row(name, value) for name, value in _facts(machine))]
    lines += [Text(), _heading("What each tier can give")]
    lines += [_row(tier.tier, f"{format_size(tier.nbytes):>12}  {tier.where}") for tier in tiers]
    if not machine.devices:
        lines.append(_row("device", "the same as host: there is no GPU"))
    lines += [_row(rate.link, f"{rate.nbytes_per_s / 2**30:>8.2f} GiB/s  measured now") for rate in machine.links]
    if calibration is not None:
        lines.append(_row("calibration", calibration.summary))
    lines += [Text(), _heading("What is missing")]
    for finding in findings:
        lines += [
            Text.assemble("  ", (finding.what, "yellow")),
            Text(f"    so: {finding.consequence}"),
            Text(f"    do: {finding.remedy}"),
        ]
    if not findings:
        lines.append(Text("  nothing"))
    return lines


def _folder(disk: Path | None) -> tuple[Path, Finding | None]:
    """The folder to examine, and why the default cannot be used where that is so."""
    if disk is not None:
        return disk, None
    try:
        return default_root(), None
    except UsageError as error:
        finding = Finding(
            what=str(error),
            consequence="there is no default scratch folder",
            remedy="set XDG_CACHE_HOME or --disk to a folder on a disk",
        )
        return Path.cwd(), finding


def _facts(machine: Machine) -> list[tuple[str, str]]:
    processor, host, software = machine.processor, machine.host, machine.software
    cores = f"{processor.usable_cores} usable of {processor.physical_cores or '?'} physical cores"
    limit = f"{format_size(host.limit_nbytes)} ({host.limit_source})" if host.limit_nbytes is not None else "none"
    memlock = format_size(machine.memlock_nbytes) if machine.memlock_nbytes is not None else "unlimited"
    built = f"CUDA {software.torch_cuda}" if software.torch_cuda else "CPU only"
    disk = machine.disk
    facts = [
        ("CPU", f"{processor.model}, {cores}"),
        ("ISA", " ".join(processor.flags) or "unknown"),
        ("RAM", f"{format_size(host.total_nbytes)}, {format_size(host.available_nbytes)} available"),
        ("cgroup", f"memory limit: {limit}"),
        ("memlock", f"{memlock} (reported only, never a cap)"),
        ("huge pages", machine.huge_pages or "not in this kernel"),
        ("software", f"Python {software.python}, Linux {software.kernel}"),
        ("torch", f"{software.torch} ({built})" if software.torch else "cannot be imported"),
        ("transformers", software.transformers or "not installed"),
    ]
    facts += [
        (
            f"cuda:{device.index}",
            f"{device.name} (compute capability {device.compute_capability}), {format_size(device.total_nbytes)}, "
            f"{format_size(device.free_nbytes)} free",
        )
        for device in machine.devices
    ]
    direct = "works" if machine.direct_io.works else f"does not work ({machine.direct_io.reason})"
    facts.append(("disk", f"{disk.folder}: {format_size(disk.free_nbytes)} free, {disk.filesystem}, O_DIRECT {direct}"))
    return facts


def _fields(machine: Machine) -> dict[str, object]:
    fields = {field.name: getattr(machine, field.name) for field in dataclasses.fields(machine)}
    if not machine.links:
        del fields["links"]  # not measured is not the same as no links
    return fields


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _row(name: str, value: str) -> Text:
    return Text.assemble("  ", (f"{name:<13}", "cyan"), value)
