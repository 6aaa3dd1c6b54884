"""The record of a calibration: its file form is strict, and everything that makes it stale is told in words."""

import json
from typing import Any

import msgspec
import pytest
from calibrations import DAY_S, DRIVE, GPU, MACHINE, TAKEN_S, calibration, hardware

from penstock.memory.errors import CalibrationError, UsageError
from penstock.scheduler.calibration import (
    SCHEMA,
    decode_calibration,
    encode_calibration,
    named_curves,
    noise,
    noisy_curves,
    stale,
)

change = msgspec.structs.replace


def test_there_and_back() -> None:
    for made in (calibration(), calibration(device="cuda:0", gpu=True)):
        assert decode_calibration(encode_calibration(made), source="x") == made
    assert calibration().date == "2027-01-15 08:00 UTC"


def damaged(**fields: Any) -> bytes:
    return json.dumps({**json.loads(encode_calibration(calibration())), **fields}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        encode_calibration(calibration())[:-200],
        damaged(schema="1"),
        damaged(surprise=1),
        damaged(seconds="12"),
        damaged(quick=1),
        damaged(taken_unix_s=None),
        damaged(hardware={}),
        damaged(hardware={**msgspec.to_builtins(hardware()), "host_nbytes": -1}),
        damaged(hardware={**msgspec.to_builtins(hardware()), "drives": []}),  # fewer than are named
    ],
)
def test_a_damaged_file_says_so(data: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"^here is damaged .*penstock calibrate --force"):
        decode_calibration(data, source="here")


def test_other_versions() -> None:
    with pytest.raises(CalibrationError, match="newer penstock"):
        decode_calibration(damaged(schema=SCHEMA + 1, field_of_the_future=1), source="here")
    with pytest.raises(CalibrationError, match="older penstock"):
        decode_calibration(damaged(schema=SCHEMA - 1), source="here")


def test_drives_are_named_as_they_were_measured() -> None:
    with pytest.raises(UsageError, match="2 are named, 1 were measured"):
        calibration(fingerprint=change(MACHINE, drives=(DRIVE, DRIVE)))


def test_fresh_on_the_same_machine() -> None:
    same = change(MACHINE, kernel="6.9", drives=(change(DRIVE, folder="/elsewhere"),))
    assert stale(calibration(), same, now_unix_s=TAKEN_S + 29 * DAY_S) == []


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (change(MACHINE, cpu="CPU 1"), "another machine: its CPU is CPU 9000, this one CPU 1"),
        (change(MACHINE, memory_nbytes=32 * 2**30), "64.0 GiB then, 32.0 GiB now"),
        (change(MACHINE, cores=4), "cores: 8 then, 4 now"),
        (change(MACHINE, cpu_quota=2.5), "the CPU quota: none then, 2.5 CPUs now"),
        (change(MACHINE, torch="2.11.0"), "torch: 2.13.0 then, 2.11.0 now"),
        (change(MACHINE, threads=2), "threads of torch: 8 then, 2 now"),
        (change(MACHINE, drives=()), "the drive of /data is gone (SSD 1 (nvme0n1))"),
        (change(MACHINE, drives=(change(DRIVE, device=1),)), "the drive of /data is gone"),
        (change(MACHINE, drives=(change(DRIVE, filesystem="ext4"),)), "the drive of /data is gone"),
    ],
)
def test_what_makes_it_stale(now: Any, words: str) -> None:
    (reason,) = stale(calibration(), now, now_unix_s=TAKEN_S)
    assert words in reason


def test_another_gpu_or_driver() -> None:
    kept = calibration(device="cuda:0", gpu=True, fingerprint=change(MACHINE, gpus=(GPU,)))
    for gpus, words in (
        ((), "the GPU is another: Big GPU (GPU-1) then, none now"),
        ((change(GPU, uuid="GPU-2", name="Other"),), "then, Other now"),
        ((change(GPU, driver="580.1"),), "the GPU's driver: 570.86.15 then, 580.1 now"),
    ):
        (reason,) = stale(kept, change(MACHINE, gpus=gpus), now_unix_s=TAKEN_S)
        assert words in reason
    assert stale(kept, change(MACHINE, gpus=(change(GPU, uuid="GPU-0"), GPU)), now_unix_s=TAKEN_S) == []


def test_age() -> None:
    assert stale(calibration(), MACHINE, now_unix_s=TAKEN_S + 31 * DAY_S) == ["it is 31 days old; 30 are trusted"]
    assert "from the future" in stale(calibration(), MACHINE, now_unix_s=TAKEN_S - 2 * DAY_S)[0]


def test_noise_is_a_median_and_names_the_noisy() -> None:
    machine = hardware()
    assert sorted(named_curves(machine)) == [
        "SSD 1 (nvme0n1) read",
        "SSD 1 (nvme0n1) write",
        "cpu attention bfloat16",
        "cpu linear bfloat16",
        "cpu memory copy",
    ]
    assert noise(machine) == 0.05  # of 0.02 0.03 0.04 0.05 0.1 0.3 0.4
    assert noisy_curves(machine) == {"SSD 1 (nvme0n1) read": pytest.approx(0.35)}
    assert {"h2d", "d2h", "gpu linear bfloat16"} <= named_curves(hardware(gpu=True)).keys()
    assert "gpu linear bfloat16" not in named_curves(change(hardware(gpu=True), emulated=True))
