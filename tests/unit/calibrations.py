"""A calibration made up for tests."""

from __future__ import annotations

from penstock.scheduler.calibration import Calibration, DriveIdentity, Fingerprint, GpuIdentity
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Link, Processor

GIB = 2**30
DAY_S = 86400.0
TAKEN_S = 1_800_000_000.0

DRIVE = DriveIdentity(folder="/data", device=259, filesystem="xfs", model="SSD 1 (nvme0n1)")
GPU = GpuIdentity(name="Big GPU", driver="570.86.15", uuid="GPU-1")
MACHINE = Fingerprint(
    cpu="CPU 9000",
    cores=8,
    cpu_quota=None,
    memory_nbytes=64 * GIB,
    kernel="6.8",
    torch="2.13.0",
    threads=8,
    drives=(DRIVE,),
)


def flat(gib: float, *spread: float) -> Curve:
    return Curve(x=(1.0,), y=(gib * GIB,), spread=spread)


def hardware(*, gpu: bool = False) -> Hardware:
    def processor(name: str, scale: float, cores: int) -> Processor:
        return Processor(
            name=name,
            memory_nbytes=64 * GIB,
            memory=flat(40 * scale, 0.1),
            linear={"bfloat16": Curve(x=(1.0, 16.0), y=(30 * scale * GIB, 8 * scale * GIB), spread=(0.02, 0.04))},
            attention={"bfloat16": flat(20 * scale, 0.03)},
            adam=1e9,
            launch_s=2e-6,
            module_call_s=1e-6,
            cores=cores,
        )

    request = 4 * 2**20
    return Hardware(
        name="a machine",
        cpu=processor("CPU 9000", 1, 8),
        host_nbytes=64 * GIB,
        drives=(
            Drive(
                name="SSD 1 (nvme0n1)",
                read=Curve(x=(2.0**16, request), y=(1.0 * GIB, 3.0 * GIB), spread=(0.3, 0.4)),
                write=flat(2, 0.05),
                latency_s=8e-5,
            ),
        ),
        gpu=processor("Big GPU", 50, 0) if gpu else None,
        link=Link(h2d=flat(25, 0.01), d2h=flat(24, 0.01)) if gpu else None,
    )


def calibration(*, device: str = "cpu", gpu: bool = False, fingerprint: Fingerprint = MACHINE) -> Calibration:
    return Calibration(
        device=device,
        hardware=hardware(gpu=gpu),
        fingerprint=fingerprint,
        taken_unix_s=TAKEN_S,
        seconds=12.5,
        quick=False,
        noise=0.04,
        notes=("something to note",),
    )
