"""What is missing on a machine: each finding with its consequence and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..sizes import format_size
from .machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that this machine lacks."""

    what: str
    consequence: str
    remedy: str


def find_missing(machine: Machine) -> tuple[Finding, ...]:
    """Everything worth telling, the gravest first."""
    return (*_software(machine), *_memory(machine), *_disk(machine), *_processor(machine))


def _software(machine: Machine) -> Iterator[Finding]:
    software = machine.software
    if software.torch is None:
        yield Finding(
            what=f"torch cannot be imported: {software.torch_error}",
            consequence="no model can be loaded",
            remedy="pip install torch (https://pytorch.org/get-started tells the right index for your driver)",
        )
    if software.transformers is None:
        yield Finding(
            what="transformers is not installed",
            consequence="checkpoints cannot be loaded; penstock.offload(module) works",
            remedy="pip install 'transformers>=5.17'",
        )
    if machine.devices:
        if not software.triton:
            yield Finding(
                what="triton is not installed",
                consequence="on the GPU, kernels run as plain torch operations",
                remedy="pip install triton",
            )
    elif software.torch is not None:
        yield _no_device(machine)


def _no_device(machine: Machine) -> Finding:
    consequence = "device and host are one tier, and the CPU computes everything"
    if not machine.nvidia_driver:
        return Finding(
            what="no CUDA device",
            consequence=consequence,
            remedy="none needed to run on the CPU; with a GPU in the machine, install the NVIDIA driver",
        )
    if machine.software.torch_cuda is None:
        return Finding(
            what=f"an NVIDIA driver is loaded, but torch {machine.software.torch} was built without CUDA",
            consequence=consequence,
            remedy="install a CUDA build of torch (https://pytorch.org/get-started)",
        )
    return Finding(
        what=f"an NVIDIA driver is loaded, but torch (CUDA {machine.software.torch_cuda}) finds no device",
        consequence=consequence,
        remedy="check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough for this CUDA version",
    )


def _memory(machine: Machine) -> Iterator[Finding]:
    host = machine.host
    if host.limit_nbytes is not None:
        limit, total = format_size(host.limit_nbytes), format_size(host.total_nbytes)
        yield Finding(
            what=f"a control group limits memory to {limit} of {total}",
            consequence=f"automatic budgets start from that limit ({host.limit_source})",
            remedy="raise the memory limit of the container or the batch job if the machine is yours",
        )
    if machine.huge_pages == "never":
        yield Finding(
            what="transparent huge pages are switched off",
            consequence="arenas are made of 4 KiB pages: pinning them and walking through them is slower",
            remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _disk(machine: Machine) -> Iterator[Finding]:
    disk = machine.disk
    if disk.in_memory:
        yield Finding(
            what=f"{disk.folder} is on {disk.filesystem}, which is memory",
            consequence="blocks kept there save no memory; it is refused as the default scratch folder",
            remedy="set XDG_CACHE_HOME or --disk to a folder on a disk",
        )
    elif not machine.direct_io.works:
        yield Finding(
            what=f"O_DIRECT does not work: {machine.direct_io.reason}",
            consequence="reads and writes go through the page cache, which costs a copy and competes for memory",
            remedy="set --disk to a folder that you may write to on a local ext4 or xfs filesystem",
        )


def _processor(machine: Machine) -> Iterator[Finding]:
    flags = machine.processor.flags
    x86 = "sse4_2" in flags
    if x86 and not {"avx512_bf16", "amx_bf16"}.intersection(flags):
        yield Finding(
            what="the CPU has no bf16 arithmetic (avx512_bf16 or amx_bf16)",
            consequence="on the CPU, bf16 models convert to fp32 on the fly and compute more slowly",
            remedy="none needed for models bound by the disk; otherwise load with dtype='float32' where memory allows",
        )
