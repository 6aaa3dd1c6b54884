"""Budgets in bytes from what the user wrote and what the machine can give."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.capacity import host_capacity
from ..memory.errors import UsageError
from ..memory.ledger import Reservation, process_ledger
from .devices.base import Device
from .planning import Budgets


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Budgets as asked for; None is auto."""

    host: int | None
    device: int | None
    disk: int | None = None


def resolve_budgets(
    wanted: Wanted, device: Device, *, headroom_nbytes: int, disk_rate: float | None, link_rate: float | None
) -> Budgets:
    """Fill in what is auto.

    `auto` takes what can still be allocated and no other model has reserved, less the headroom of a run (which goes to
    the tier that computes).

    Raises:
        UsageError: a tier has no automatic budget on this device.
    """
    if device.separate:
        on_device, on_host = headroom_nbytes, 96 * 2**20
    else:
        on_device, on_host = 0, headroom_nbytes
    host = wanted.host
    if host is None:
        host = max(0, _unclaimed_host_nbytes() - on_host)
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

    Args:
        freed_nbytes: Host memory that will be given back while the reservation is filled.

    Raises:
        DoesNotFitError: a tier cannot give so much, besides what other models have reserved and not touched yet.
            Nothing is booked.
    """
    ledger = process_ledger()
    room = _unclaimed_host_nbytes() + freed_nbytes
    if device.separate and device.torch_device.type == "cpu":
        room -= device_nbytes  # an emulated device's memory is the host's
    limit = ledger.reserved("host") + max(0, room)
    booked = [ledger.reserve(owner, "host", host_nbytes, limit_nbytes=limit)]
    if device.separate:
        available = device.available_nbytes()
        held = ledger.reserved("device")
        try:
            limit_or_none = None if available is None else held + available
            booked.append(ledger.reserve(owner, "device", device_nbytes, limit_nbytes=limit_or_none))
        except BaseException:
            booked[0].release()
            raise
    return booked


def _unclaimed_host_nbytes() -> int:
    """What can still be allocated, less what models of this process will touch later."""
    return max(0, host_capacity().available_nbytes - process_ledger().untouched("host"))


def skewed(device: Device) -> bool:
    """Whether the device computes with the CPU's kernels, whose bits may depend on how operands are aligned."""
    return device.torch_device.type == "cpu"
