"""What `penstock doctor` finds out about a machine, as plain records. Nothing here prints."""

from __future__ import annotations

import importlib.util
import mmap
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from ..memory.capacity import DiskCapacity, HostCapacity, disk_capacity, host_capacity, memlock_limit

_FLAGS_THAT_MATTER: Final = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("sse4_2", "pclmulqdq"),  # crc32c in hardware
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2", "crc32"),
)
"""Instruction sets that decide how fast matrices are multiplied and checksums taken, as /proc/cpuinfo calls them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """The CPU."""

    model: str
    physical_cores: int | None
    usable_cores: int
    """Logical processors that this process may run on."""
    flags: tuple[str, ...]
    """Those of its instruction sets that matter here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaDevice:
    """One GPU that torch can use."""

    index: int
    name: str
    total_nbytes: int
    free_nbytes: int
    compute_capability: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Versions. None: not installed, or not importable."""

    python: str
    kernel: str
    torch: str | None
    torch_cuda: str | None
    """The CUDA version that torch was built for."""
    torch_error: str | None
    """Why torch cannot be imported."""
    transformers: str | None
    triton: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectIO:
    """Whether files of a folder can be read past the page cache."""

    works: bool
    reason: str | None
    """Why not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRate:
    """The measured bandwidth of a link."""

    link: str
    """For example "disk→host"."""
    nbytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Everything that decides where a model can live on this machine."""

    processor: Processor
    host: HostCapacity
    memlock_nbytes: int | None
    """RLIMIT_MEMLOCK; None for no limit. Only reported."""
    huge_pages: str | None
    """The mode of transparent huge pages ("always", "madvise", "never"); None where the kernel has none."""
    software: Software
    nvidia_driver: bool
    """An NVIDIA driver is loaded, whether or not torch can use it."""
    devices: tuple[CudaDevice, ...]
    disk: DiskCapacity
    direct_io: DirectIO
    links: tuple[LinkRate, ...] = ()
    """Empty where nothing was measured."""


def examine(
    folder: Path,
    *,
    proc_root: Path = Path("/proc"),
    measure_links: Callable[[Path], tuple[LinkRate, ...]] | None = None,
) -> Machine:
    """Find out what this machine has. `folder` is where scratch files would go; it need not exist and is not made."""
    software, devices = _torch_facts()
    return Machine(
        processor=_processor(proc_root),
        host=host_capacity(proc_root),
        memlock_nbytes=memlock_limit(),
        huge_pages=read_huge_pages(),
        software=software,
        nvidia_driver=(proc_root / "driver" / "nvidia" / "version").exists(),
        devices=devices,
        disk=(disk := disk_capacity(folder, proc_root)),
        direct_io=try_direct_io(Path(disk.folder)),
        links=measure_links(Path(disk.folder)) if measure_links else (),
    )


def try_direct_io(folder: Path) -> DirectIO:
    """Write one page to a temporary file in `folder` and read it back with O_DIRECT."""
    page = b"penstock".ljust(mmap.PAGESIZE, b".")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="penstock-doctor-") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                buffer = mmap.mmap(-1, mmap.PAGESIZE)  # aligned to a page, as O_DIRECT wants it
                with buffer:
                    count = os.preadv(fd, [buffer], 0)
                    same = buffer[:count] == page
            finally:
                os.close(fd)
    except OSError as error:
        return DirectIO(works=False, reason=f"{error.strerror} in {folder}")
    return DirectIO(works=same, reason=None if same else f"a page read back from {folder} differs")


def read_huge_pages(sys_root: Path = Path("/sys")) -> str | None:
    """The mode of transparent huge pages, which the kernel shows as "always [madvise] never"."""
    try:
        text = (sys_root / "kernel" / "mm" / "transparent_hugepage" / "enabled").read_text()
    except OSError:
        return None
    return next((word[1:-1] for word in text.split() if word.startswith("[")), None)


def _processor(proc_root: Path) -> Processor:
    try:
        text = (proc_root / "cpuinfo").read_text()
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # the first processor speaks for all
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Processor(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        physical_cores=psutil.cpu_count(logical=False),
        usable_cores=len(os.sched_getaffinity(0)),
        flags=tuple(flag for flag in _FLAGS_THAT_MATTER if flag in flags),
    )


def _torch_facts() -> tuple[Software, tuple[CudaDevice, ...]]:
    torch_version = torch_cuda = torch_error = None
    devices: tuple[CudaDevice, ...] = ()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        torch_error = str(error)
    else:
        torch_version, torch_cuda = str(torch.__version__), torch.version.cuda
        if torch.cuda.is_available():
            devices = tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))
    software = Software(
        python=platform.python_version(),
        kernel=platform.release(),
        torch=torch_version,
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        transformers=_version("transformers"),
        triton=importlib.util.find_spec("triton") is not None,
    )
    return software, devices


def _cuda_device(index: int) -> CudaDevice:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return CudaDevice(
        index=index,
        name=properties.name,
        total_nbytes=total,
        free_nbytes=free,
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
