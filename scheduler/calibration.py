"""What was measured on one machine, with all that tells whether it still holds: a record, its file form, its age."""

from __future__ import annotations

import datetime
import statistics
from typing import Final

import msgspec

from ..memory.errors import CalibrationError, UsageError
from .curves import Curve
from .hardware import Hardware, Processor

SCHEMA: Final = 2
"""Raised whenever a field changes its meaning."""
FRESH_S: Final = 30 * 24 * 3600.0
"""Older than this, a calibration is stale: drives fill up and wear, and drivers are updated."""
NOISY: Final = 0.25
"""A spread above which a figure is worth a warning."""
_REMEDY: Final = "run `penstock calibrate --force`"


class DriveIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which drive was measured."""

    folder: str
    """Where its probe file lay."""
    device: int
    """Its `st_dev`."""
    filesystem: str
    """The type: ext4, xfs, …"""
    model: str
    """Empty where the kernel does not tell."""


class GpuIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which GPU was measured."""

    name: str
    driver: str
    """Empty where the kernel does not tell."""
    uuid: str


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the figures depend on."""

    cpu: str
    """Model of the CPU."""
    cores: int
    """Those that the process may run on."""
    cpu_quota: float | None
    """Seconds of processor time per second that control groups allow; None for no limit."""
    memory_nbytes: int
    """RAM of the machine."""
    kernel: str
    """Told, not compared: kernels change every week."""
    torch: str
    threads: int
    """Of torch, within one operation."""
    gpus: tuple[GpuIdentity, ...] = ()
    """Those that were measured."""
    drives: tuple[DriveIdentity, ...] = ()
    """Likewise; in a calibration in the order of its hardware's drives."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine's figures as measured for one device, and where, when and how."""

    schema: int = SCHEMA
    device: str
    """What was calibrated: "cpu", "cuda:0", "emulated:h2d=1073741824"."""
    hardware: Hardware
    fingerprint: Fingerprint
    taken_unix_s: float
    seconds: float
    """How long it took."""
    quick: bool
    """Measured in a third of the time, with fewer points and repetitions."""
    noise: float
    """Median of the spreads of all points: (highest - lowest) / median of what was measured at one."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why; what makes figures doubtful."""

    def __post_init__(self) -> None:
        if len(self.fingerprint.drives) != len(self.hardware.drives):
            raise UsageError(
                f"a calibration names as many drives as it has figures of: {len(self.fingerprint.drives)} are named, "
                f"{len(self.hardware.drives)} were measured"
            )

    @property
    def date(self) -> str:
        """When it was taken, as people write it (UTC)."""
        return datetime.datetime.fromtimestamp(self.taken_unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


class _Version(msgspec.Struct):
    schema: int


def encode_calibration(calibration: Calibration) -> bytes:
    """The calibration as an indented JSON document."""
    return msgspec.json.format(msgspec.json.encode(calibration), indent=1)


def decode_calibration(data: bytes, *, source: str) -> Calibration:
    """The calibration in a JSON document.

    Args:
        data: The document.
        source: What to call it in errors.

    Raises:
        CalibrationError: it is damaged, or of another version.
    """
    try:
        schema = msgspec.json.decode(data, type=_Version).schema
        if schema == SCHEMA:
            return msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{source} is damaged ({error}): {_REMEDY}") from error
    age = "newer" if schema > SCHEMA else "older"
    raise CalibrationError(
        f"{source} was written by a {age} penstock (version {schema} of the format; this one reads {SCHEMA}): {_REMEDY}"
    )


def stale(calibration: Calibration, now: Fingerprint, *, now_unix_s: float) -> list[str]:
    """Why a calibration does not hold any more, in words; empty where it does.

    Args:
        calibration: What was kept.
        now: The machine as it is; its drives are those that can be found where the calibration's were.
        now_unix_s: The time.
    """
    then = calibration.fingerprint
    reasons = []
    if then.cpu != now.cpu:
        reasons.append(f"it is of another machine: its CPU is {then.cpu}, this one {now.cpu}")
    if abs(then.memory_nbytes - now.memory_nbytes) > 0.05 * then.memory_nbytes:
        reasons.append(
            f"the memory is another: {then.memory_nbytes / 2**30:.1f} GiB then, {now.memory_nbytes / 2**30:.1f} GiB now"
        )
    for what, before, after in (
        ("cores", then.cores, now.cores),
        ("the CPU quota", _quota(then), _quota(now)),
        ("torch", then.torch, now.torch),
        ("threads of torch", then.threads, now.threads),
    ):
        if before != after:
            reasons.append(f"{what}: {before} then, {after} now")
    reasons += _stale_gpus(then, now)
    found = {(drive.device, drive.filesystem, drive.model) for drive in now.drives}
    reasons += [
        f"the drive of {drive.folder} is gone ({drive.model or drive.filesystem})"
        for drive in then.drives
        if (drive.device, drive.filesystem, drive.model) not in found
    ]
    age_s = now_unix_s - calibration.taken_unix_s
    if age_s > FRESH_S:
        reasons.append(f"it is {age_s / 86400:.0f} days old; {FRESH_S / 86400:.0f} are trusted")
    elif age_s < -86400:
        reasons.append(f"it is from the future: {calibration.date}")
    return reasons


def _stale_gpus(then: Fingerprint, now: Fingerprint) -> list[str]:
    reasons = []
    here = {gpu.uuid: gpu for gpu in now.gpus}
    for gpu in then.gpus:
        found = here.get(gpu.uuid)
        if found is None:
            others = ", ".join(other.name for other in now.gpus) or "none"
            reasons.append(f"the GPU is another: {gpu.name} ({gpu.uuid}) then, {others} now")
        elif found.driver != gpu.driver:
            reasons.append(f"the GPU's driver: {gpu.driver or '?'} then, {found.driver or '?'} now")
    return reasons


def _quota(fingerprint: Fingerprint) -> str:
    return "none" if fingerprint.cpu_quota is None else f"{fingerprint.cpu_quota:g} CPUs"


def named_curves(hardware: Hardware) -> dict[str, Curve]:
    """Every curve of a machine by what people call it."""
    found: dict[str, Curve | None] = {}
    for drive in hardware.drives:
        found[f"{drive.name} read"] = drive.read
        found[f"{drive.name} write"] = drive.write
        found[f"{drive.name} read by depth"] = drive.read_depth
    if hardware.link is not None:
        link = hardware.link
        found |= {"h2d": link.h2d, "d2h": link.d2h, "h2d pageable": link.h2d_pageable}
        found["d2h pageable"] = link.d2h_pageable
    found |= _of_processor("cpu", hardware.cpu)
    if hardware.gpu is not None and not hardware.emulated:  # which computes as the CPU does
        found |= _of_processor("gpu", hardware.gpu)
    return {name: curve for name, curve in found.items() if curve is not None}


def _of_processor(kind: str, processor: Processor) -> dict[str, Curve | None]:
    return {
        f"{kind} memory copy": processor.memory,
        f"{kind} memory read": processor.memory_read,
        f"{kind} memory write": processor.memory_write,
        **{f"{kind} linear {dtype}": curve for dtype, curve in processor.linear.items()},
        **{f"{kind} attention {dtype}": curve for dtype, curve in processor.attention.items()},
        **{f"{kind} attention backward {dtype}": curve for dtype, curve in processor.attention_back.items()},
        **{f"{kind} elementwise {dtype}": curve for dtype, curve in processor.elementwise.items()},
    }


def noise(hardware: Hardware) -> float:
    """Median of the spreads of all points of all curves; 0 where nothing was measured more than once."""
    spreads = [spread for curve in named_curves(hardware).values() for spread in curve.spread]
    return statistics.median(spreads) if spreads else 0.0


def noisy_curves(hardware: Hardware, *, above: float = NOISY) -> dict[str, float]:
    """The curves whose points have a median spread above a limit, with that spread."""
    medians = {name: statistics.median(c.spread) for name, c in named_curves(hardware).items() if c.spread}
    return {name: spread for name, spread in medians.items() if spread > above}
