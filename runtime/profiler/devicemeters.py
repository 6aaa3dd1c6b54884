"""Meters of a CUDA device: torch's allocator, the driver, NVML. For a device that the program has begun to use."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import torch

from .captures import aside
from .meters import Reader
from .schema import Meter

_cuda: Final[Any] = torch.cuda


def device_meters(index: int) -> list[tuple[Meter, Reader]]:
    """Memory and energy of the CUDA device with this number. What cannot be read has no meter."""
    found: list[tuple[Meter, Reader]] = [
        (Meter.DEVICE_ALLOCATED, lambda: int(_cuda.memory_allocated(index))),
        (Meter.DEVICE_RESERVED, lambda: int(_cuda.memory_reserved(index))),
        (Meter.DEVICE_USED, lambda: _used(index)),
    ]
    energy = device_energy(index)
    if energy is not None:
        found.append((Meter.ENERGY_DEVICE, energy))
    return found


def device_energy(index: int) -> Reader | None:
    """Microjoules of one GPU, from the driver (`nvidia-ml-py`, where it is installed)."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        # By name: NVML numbers all devices, CUDA those that CUDA_VISIBLE_DEVICES leaves.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{_cuda.get_device_properties(index).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, driver, counter or name (a part of a GPU): NVML has an exception class for each
        return None

    def read() -> int:
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1000
        except nvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from error  # what the sampler knows to leave a meter out for

    return read


def _used(index: int) -> int:
    with aside(index) as safe:
        if not safe:
            raise RuntimeError("the driver cannot be asked without harm to graphs that are captured meanwhile")
        free, total = _cuda.mem_get_info(index)
    return int(total - free)
