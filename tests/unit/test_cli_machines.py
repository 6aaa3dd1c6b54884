"""Which machine a run is foreseen on."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from calibrations import DRIVE, calibration, flat

from penstock.cli.machines import with_drive_of


def test_of_several_drives_a_run_has_the_one_it_lies_on(tmp_path: Path) -> None:
    here = msgspec.structs.replace(DRIVE, folder=str(tmp_path), device=os.stat(tmp_path).st_dev)
    other = msgspec.structs.replace(DRIVE, folder="/elsewhere", device=here.device + 1)
    kept = calibration()
    fast, slow = kept.hardware.drives[0], msgspec.structs.replace(kept.hardware.drives[0], name="slow", read=flat(1))
    kept = msgspec.structs.replace(
        kept,
        hardware=msgspec.structs.replace(kept.hardware, drives=(fast, slow), drives_together=0.8),
        fingerprint=msgspec.structs.replace(kept.fingerprint, drives=(other, here)),
    )
    found = with_drive_of(kept, tmp_path / "a run that is not there yet")
    assert found.drives == (slow,)
    assert found.disk_read == slow.read.best
