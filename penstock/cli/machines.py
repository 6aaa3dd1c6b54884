"""The machine that a user means: this one, a known one, or one from a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..memory.errors import UsageError
from ..scheduler.hardware import Hardware


def find_machine(spec: str | None, *, device: str, disk: Path | None) -> Hardware:
    """The machine that `spec` names; None is this one.

    Raises:
        UsageError: it is not known, or this one has not been calibrated.
    """
    if spec is None:
        raise UsageError("this machine has not been measured: run `penstock calibrate` once, or name a --hardware")
    return msgspec.json.decode(Path(spec).read_bytes(), type=Hardware)


def known_machines() -> list[Hardware]:
    """Those that come with penstock."""
    return []
