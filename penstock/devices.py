"""Which device a user means: "auto", "cpu", "cuda", "cuda:1", "emulated:h2d=1GiB/s,d2h=1GiB/s,disk=2GiB/s"."""

from __future__ import annotations

import logging

import torch

from .memory.errors import UsageError
from .runtime.devices.base import Device
from .runtime.devices.cpu import CpuDevice
from .runtime.devices.emulated import EmulatedDevice, Rates
from .sizes import parse_size

logger = logging.getLogger(__name__)

_LINKS = ("h2d", "d2h", "disk")


def open_device(spec: str | torch.device) -> Device:
    """The backend for a device specification.

    Raises:
        UsageError: it has no meaning, or names a device that this machine does not have.
    """
    text = str(spec)
    name, _, options = text.partition(":")
    if name == "auto":
        return open_device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu" and not options:
        return CpuDevice()
    if name == "emulated":
        return EmulatedDevice(_rates(options))
    if name == "cuda":
        return _cuda(text, options)
    raise UsageError(
        f"unknown device {text!r}: use auto, cpu, cuda, cuda:N, or emulated:h2d=1GiB/s,d2h=1GiB/s,disk=2GiB/s"
    )


def _cuda(text: str, index: str) -> Device:
    if not torch.cuda.is_available():
        raise UsageError(f"device {text!r} was asked for, and torch {torch.__version__} sees no CUDA device: use cpu")
    count = torch.cuda.device_count()
    if index and not index.isdigit():
        raise UsageError(f"unknown device {text!r}: write cuda:N with a number")
    number = int(index or torch.cuda.current_device())
    if number >= count:
        raise UsageError(f"device {text!r} was asked for; this machine has cuda:0 to cuda:{count - 1}")
    if count > 1:
        logger.info("%d CUDA devices: using cuda:%d only", count, number)
    from .runtime.devices.cuda import CudaDevice

    return CudaDevice(number)


def _rates(options: str) -> Rates:
    found: dict[str, float] = {}
    for item in filter(None, options.split(",")):
        link, _, rate = item.partition("=")
        if link not in _LINKS or not rate.endswith("/s"):
            raise UsageError(
                f"cannot read {item!r} in an emulated device: write {', '.join(f'{name}=1GiB/s' for name in _LINKS)}"
            )
        nbytes = parse_size(rate.removesuffix("/s"))
        if nbytes <= 0:
            raise UsageError(f"the rate in {item!r} must be more than zero")
        found[link] = float(nbytes)
    return Rates(**found)
