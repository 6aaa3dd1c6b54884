"""Measure a machine for one device: all probes, one after the other, within some seconds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import torch

from ...memory.arena import HostArena
from ...memory.capacity import disk_capacity, host_capacity
from ...memory.errors import CalibrationError, DoesNotFitError, PenstockError, UsageError
from ...memory.requests import THREADS
from ...memory.scratch import default_root
from ...scheduler.calibration import Calibration, DriveIdentity, Fingerprint, noise, noisy_curves
from ...scheduler.hardware import Drive, Hardware, Link, Processor, Sharing
from ..devices.base import Device
from .cache import device_key
from .disk import DEPTHS, WRITE_NBYTES, DriveProbe, EngineMaker, drives_together, engine_maker
from .diskload import AHEAD, FILE_NBYTES, PIECE, ProbeFile, probe_file
from .fingerprint import cpu_model, fingerprint, identify_drive
from .framework import decoding_token
from .lastlevel import last_level_cache
from .link import measure_link
from .others import Others, others_between, read_ticks
from .processor import ProcessorProbe
from .products import one_row
from .serving import serving_cost
from .sharing import ALONE, Beside, Load, copy_load, disk_load, share
from .timing import device_timer

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_NBYTES: Final = 192 * 2**20
"""Of memory at a time, for what is measured; activations and results come on top."""
LEAST_NBYTES: Final = 64 * 2**20
GPU_NBYTES: Final = 2**30
"""Of a GPU's memory: it reads that in less than a millisecond."""
FOREIGN_CORES: Final = 0.1
"""Share of the cores that others may take before the figures are doubtful."""
Progress = Callable[[str], None]
"""Told what is measured next."""


def _nobody(_: str) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Seconds for each part; about half of the whole goes to warming up, filling files and starting threads."""

    drive: float
    """Each."""
    together: float
    link: float
    processor: float
    """Each."""
    sharing: float
    """Each of the two."""
    file_nbytes: int = FILE_NBYTES
    write_nbytes: int = WRITE_NBYTES
    depths: tuple[int, ...] = DEPTHS
    quick: bool = False
    """Whether processors are measured at fewer points."""


THOROUGH: Final = Pace(drive=2.5, together=0.4, link=1.5, processor=5.0, sharing=0.9)
QUICK: Final = Pace(
    drive=0.7,
    together=0.2,
    link=0.5,
    processor=1.2,
    sharing=0.45,
    file_nbytes=128 * 2**20,
    write_nbytes=192 * 2**20,
    depths=(1, 4, THREADS),
    quick=True,
)


@dataclass(kw_only=True)
class Run:
    """One calibration while it goes on.

    Args:
        device: What is calibrated.
        folders: On the drives to measure; empty is the scratch folder in the user's cache.
        pace: How long each part may take.
        progress: Told of each part.
        nbytes: Of memory to use at a time.
    """

    device: Device
    folders: Sequence[str]
    pace: Pace
    nbytes: int
    progress: Progress = _nobody
    notes: list[str] = field(default_factory=list)
    identities: list[DriveIdentity] = field(default_factory=list)
    """Of the drives that were measured."""

    def attempt(self, what: str, measure: Callable[[], T]) -> T | None:
        """Measure one thing; what goes wrong becomes a note, so that the rest is measured all the same."""
        self.progress(what)
        try:
            return measure()
        except (PenstockError, RuntimeError, OSError, MemoryError) as error:
            logger.info("%s was not measured", what, exc_info=True)
            first = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.notes.append(f"{what} was not measured: {first}")
            return None

    def hardware(self, name: str) -> Hardware:
        """Everything, one after the other.

        Raises:
            CalibrationError: the CPU could not be measured at all.
        """
        cpu = self._processor(torch.device("cpu"))
        if cpu is None:
            raise CalibrationError(f"nothing could be measured on the CPU: {'; '.join(self.notes)}")
        gpu, link, copying = self._device(cpu)
        drives, together, reading, serve_s = self._drives()
        return Hardware(
            name=name,
            cpu=cpu,
            host_nbytes=host_capacity().total_nbytes,
            drives=drives,
            drives_together=together,
            gpu=gpu if link is not None else None,
            link=link if gpu is not None else None,
            sharing=Sharing(
                compute_while_reading=reading.product.compute,
                read_while_computing=reading.product.load,
                compute_while_copying=copying.product.compute,
                copy_while_computing=copying.product.load,
                start_while_reading=reading.start.compute,
                read_while_starting=reading.start.load,
                start_while_copying=copying.start.compute,
                copy_while_starting=copying.start.load,
                serve_s=serve_s,
            ),
            sources=("measured by `penstock calibrate`",),
            emulated=self.device.separate and self.device.torch_device.type == "cpu",
        )

    def _processor(self, device: torch.device) -> Processor | None:
        pace = self.pace
        nbytes = self.nbytes
        if device.type == "cuda":
            nbytes = min(GPU_NBYTES, (self.device.available_nbytes() or 0) // 4)
        return ProcessorProbe(
            device=device, nbytes=nbytes, seconds=pace.processor, attempt=self.attempt, quick=pace.quick
        ).measure()

    def _device(self, cpu: Processor) -> tuple[Processor | None, Link | None, Beside]:
        """The device's processor, its link, and what products and copies leave each other."""
        device = self.device
        if not device.separate:
            return None, None, ALONE
        if device.torch_device.type == "cpu":
            gpu: Processor | None = cpu
        else:
            gpu = self._processor(device.torch_device)
        half = self.nbytes // 2
        link = self.attempt(f"link to {device.name}", lambda: measure_link(device, nbytes=half, seconds=self.pace.link))
        shares = self.attempt("products while copying", lambda: self._while_copying(half // 2))
        return gpu, link, shares or ALONE

    def _while_copying(self, nbytes: int) -> Beside:
        host = self.device.host_arena(nbytes)
        try:
            host.poison(host.cut(nbytes))
            target = self.device.device_arena(nbytes)
            try:
                return self._beside(copy_load(self.device, host, target))
            finally:
                target.close()
        finally:
            host.close()

    def _beside(self, load: Load) -> Beside:
        """What a load and the CPU leave each other."""
        seconds = self.pace.sharing / 2
        return Beside(
            product=share(self._product(), load, seconds=seconds),
            start=share(decoding_token(torch.device("cpu")), load, seconds=seconds),
        )

    def _product(self) -> Callable[[], float]:
        cpu = torch.device("cpu")
        return one_row(cpu, torch.bfloat16, nbytes=self.nbytes // 2, timer=device_timer(cpu))

    def _drives(self) -> tuple[tuple[Drive, ...], float, Beside, float]:
        """The drives, what is left of their rates together, what reads and products leave each other, and what it
        takes to bring a block."""
        engines = engine_maker(self.device.disk_throttle)
        arena = HostArena(AHEAD * PIECE, tier="measuring")
        with ExitStack() as held:
            held.callback(arena.close)
            arena.poison(arena.cut(arena.nbytes))
            files: list[ProbeFile] = []
            drives: list[Drive] = []
            for folder, identity in self._different_drives():
                label = folder or "the user's cache"
                file = self.attempt(
                    f"file on the drive of {label}",
                    lambda folder=folder: held.enter_context(  # type: ignore[misc]
                        probe_file(folder, arena, nbytes=self.pace.file_nbytes)
                    ),
                )
                drive = file and self.attempt(
                    f"drive of {label}",
                    lambda file=file, name=identity.model or identity.folder: self._drive(  # type: ignore[misc]
                        file, name, arena, engines
                    ),
                )
                if file and drive:
                    files.append(file)
                    drives.append(drive)
                    self.identities.append(identity)
            together = None
            if len(files) > 1:
                rates = [drive.read.best for drive in drives]
                together = self.attempt(
                    "all drives at once",
                    lambda: drives_together(files, arena, engines=engines, rates=rates, seconds=self.pace.together),
                )
            shares = serve_s = None
            if files:
                shares = self.attempt(
                    "products while reading",
                    lambda: self._beside(disk_load(files[0], arena, engines)),
                )
                serve_s = self.attempt(
                    "bringing blocks",
                    lambda: serving_cost(
                        files[0], arena, engines=engines, compute=self._product(), seconds=self.pace.sharing / 2
                    ),
                )
        return tuple(drives), together or 1.0, shares or ALONE, serve_s or 0.0

    def _different_drives(self) -> list[tuple[str | None, DriveIdentity]]:
        """One folder on each drive: as it was named, and what it is on. Nothing was made there yet."""
        if not self.folders:
            root = self.attempt("scratch folder in the user's cache", default_root)
            identity = root and identify_drive(disk_capacity(root).folder)
            return [(None, identity)] if identity else []
        seen: dict[int, tuple[str | None, DriveIdentity]] = {}
        for folder in self.folders:
            identity = identify_drive(disk_capacity(folder).folder)
            if identity is not None:
                seen.setdefault(identity.device, (folder, identity))
        return list(seen.values())

    def _drive(self, file: ProbeFile, name: str, arena: HostArena, engines: EngineMaker) -> Drive:
        return DriveProbe(file=file, arena=arena, engines=engines).measure(
            name,
            seconds=self.pace.drive,
            depths=self.pace.depths,
            write_nbytes=self.pace.write_nbytes,
            capacity_nbytes=disk_capacity(os.path.dirname(file.path)).total_nbytes,
        )


def calibrate(
    device: Device,
    folders: Sequence[str] = (),
    *,
    quick: bool = False,
    progress: Progress = _nobody,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> Calibration:
    """Measure this machine for a device, in about 15 seconds, or 5 where it is to be quick.

    Uses at most 384 MiB of memory, and of each drive 256 MiB, which are given back; a GB is written to each. Nothing
    else should run meanwhile. What cannot be measured is said in the notes.

    Args:
        device: What is to compute.
        folders: One on each drive to measure; the scratch folder in the user's cache if empty.
        quick: Fewer points and repetitions.
        progress: Told what is measured next.
        clock: Seconds since any moment.
        wall_clock: Seconds since 1970.

    Raises:
        UsageError: a folder lies in memory.
        DoesNotFitError: there is too little memory to measure anything.
        CalibrationError: the CPU could not be measured.
    """
    start = clock()
    for folder in folders:
        disk = disk_capacity(folder)
        if disk.in_memory:
            raise UsageError(f"{folder} is on {disk.filesystem}, which is memory, not disk: name another with --disk")
    pace = QUICK if quick else THOROUGH
    run = Run(device=device, folders=folders, pace=pace, nbytes=_memory_to_use(), progress=progress)
    before = read_ticks()
    hardware = run.hardware(f"this machine ({cpu_model()})")
    after = read_ticks()
    others = others_between(before, after) if before and after else None
    now = fingerprint(device.torch_device, ())
    return Calibration(
        device=device_key(device),
        hardware=hardware,
        fingerprint=msgspec.structs.replace(now, drives=tuple(run.identities)),
        taken_unix_s=wall_clock(),
        seconds=clock() - start,
        quick=quick,
        noise=noise(hardware),
        notes=(*run.notes, *_doubts(hardware, now, run.nbytes, others)),
    )


def _memory_to_use() -> int:
    available = host_capacity().available_nbytes
    # Half as much again is taken by activations, results and the requests to the drive.
    nbytes = min(MOST_NBYTES, available // 2) // 2**20 * 2**20
    if nbytes < LEAST_NBYTES:
        raise DoesNotFitError(
            f"measuring takes {2 * LEAST_NBYTES / 2**20:.0f} MiB of host memory, and {available / 2**20:.0f} MiB are "
            "available: end other programs, or raise the memory limit of the container",
            tier="host",
            needed_nbytes=2 * LEAST_NBYTES,
            available_nbytes=available,
        )
    return nbytes


def _doubts(hardware: Hardware, now: Fingerprint, nbytes: int, others: Others | None) -> list[str]:
    """What makes the figures doubtful, in words."""
    doubts = []
    # A thread of torch that has to wait for its core makes all others wait: figures are then alike, and all too low.
    if others is not None and others.programs > FOREIGN_CORES * now.cores:
        doubts.append(
            f"other programs took {others.programs:.1f} of {now.cores} cores meanwhile: products and memory are faster "
            "than measured; end them, then run `penstock calibrate --force`"
        )
    if others is not None and others.machines > FOREIGN_CORES * now.cores:
        doubts.append(f"the hypervisor gave {others.machines:.1f} of {now.cores} cores to other machines meanwhile")
    noisy = noisy_curves(hardware)
    if noisy:
        doubts.append(
            "repetitions lie far apart, so that something else uses the machine, or it slows itself down: "
            + ", ".join(f"{name} {spread:.0%}" for name, spread in noisy.items())
        )
    if now.cpu_quota is not None and now.cpu_quota < now.cores:
        doubts.append(
            f"a control group allows {now.cpu_quota:g} CPUs on {now.cores} cores: threads are stopped in turns, and "
            f"rates by threads are uneven; torch should have {max(int(now.cpu_quota), 1)} threads (OMP_NUM_THREADS)"
        )
    cache = last_level_cache()
    if nbytes < 2 * cache:
        doubts.append(
            f"the last cache holds {cache / 2**20:.0f} MiB and the probes use {nbytes / 2**20:.0f} MiB: rates of "
            "memory and of few rows may be those of the cache"
        )
    return doubts
