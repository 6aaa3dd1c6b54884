"""Budgets in bytes from what the user wrote and what the machine can give."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.capacity import host_capacity
from ..memory.errors import UsageError
from ..memory.ledger import Reservation, process_ledger
from .devices.base import Device
from .layout import Budgets


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Budgets as asked for; None is auto."""

    host: int | None
    device: int | None
    disk: int | None = None


def resolve_budgets(
    wanted: Wanted,
    device: Device,
    *,
    headroom_nbytes: int,
    disk_rate: float | None,
    link_rate: float | None,
    on_cpu: bool = False,
) -> Budgets:
    """Fill in what is auto.

    With `on_cpu`, layers may be computed on the CPU beside a separate device: keys and values are then in host memory,
    and a run's headroom is left there, too.

    `auto` takes what can still be allocated and no other model has reserved, less the headroom of a run (which goes to
    the tier that computes) and, of the host, what an emulated device takes of it.

    Raises:
        UsageError: a tier has no automatic budget on this device.
    """
    if lies_in_host(device):
        on_device, on_host = 0, headroom_nbytes + (wanted.device or 0)
    elif device.separate:
        on_device, on_host = headroom_nbytes, 96 * 2**20 + (headroom_nbytes if on_cpu else 0)
    else:
        on_device, on_host = 0, headroom_nbytes
    host = wanted.host
    if host is None:
        host = max(0, unclaimed_host_nbytes() - on_host)
        if device.separate:  # the device never needs more staging and homes than the weights; leave the rest alone
            host = int(host * 0.9)
    device_budget: int | None = None
    if device.separate:
        device_budget = wanted.device
        if device_budget is None:
            available = device.available_nbytes()
            if available is None:
                raise UsageError(
                    "an emulated device has no memory of its own to measure: name its budget, for example "
                    'max_memory={"device": "2GiB"} (--max-memory device=2GiB)'
                )
            device_budget = max(0, available - on_device)
    return Budgets(
        host=host,
        device=device_budget,
        disk_rate=disk_rate or 2e9,
        link_rate=link_rate or 2e10,
    )


def reserve(
    owner: str, device: Device, *, host_nbytes: int, device_nbytes: int, freed_nbytes: int = 0
) -> list[Reservation]:
    """Book the memory of one model in the process's ledger, the host's first; to be released at its end.

    An emulated device's memory is the host's and is booked there too. The host's share counts as not touched until its
    `touched` says otherwise: a model that another thread loads meanwhile must not take it.

    Args:
        freed_nbytes: Host memory that will be given back while the reservation is filled.

    Raises:
        DoesNotFitError: a tier cannot give so much, besides what other models have reserved and not touched yet.
            Nothing is booked.
    """
    ledger = process_ledger()
    needed = host_nbytes + (device_nbytes if lies_in_host(device) else 0)
    held = ledger.reserved("host")  # first: what another thread books from now on counts against the limit
    # What is not for sure beyond reach is not refused: a checkpoint that was just copied leaves its pages in the cache.
    room = max(0, host_capacity().obtainable_nbytes - ledger.untouched("host")) + freed_nbytes
    booked = [ledger.reserve(owner, "host", needed, limit_nbytes=held + room, touched=lambda: 0)]
    if device.separate:
        held = ledger.reserved("device")
        available = device.available_nbytes()
        try:
            limit_or_none = None if available is None else held + available
            booked.append(ledger.reserve(owner, "device", device_nbytes, limit_nbytes=limit_or_none))
        except BaseException:
            booked[0].release()
            raise
    return booked


def unclaimed_host_nbytes() -> int:
    """What can still be allocated, less what models of this process will touch later."""
    return max(0, host_capacity().available_nbytes - process_ledger().untouched("host"))


def lies_in_host(device: Device) -> bool:
    """Whether the device's own memory is the host's: that of an emulated device."""
    return device.separate and device.torch_device.type == "cpu"


def skewed(device: Device) -> bool:
    """Whether the device computes with the CPU's kernels, whose bits may depend on how operands are aligned."""
    return device.torch_device.type == "cpu"
