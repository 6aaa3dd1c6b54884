"""Which processor updates masters and states: the CPU, which has them in its memory, or a device they are sent to.

Per element a device takes all arrays and the gradient over the link, and sends arrays and the new weight back; the CPU
takes a few passes over its memory. Both can be at work at the same time, each on shards of its own, so that an update
takes as long as the slower of the two: the part of the shards with which that is least goes to the device. Where drives
bind (shards that do not stay in memory), the device saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from ..memory.errors import UsageError
from ..memory.requests import CHUNK
from .cost import CostModel
from .stepload import UpdateWork
from .updatework import checks_s, update_s, update_there_s

PARTS: Final = 16
"""Parts of all shards in which shares are counted."""
GAIN: Final = 0.05
"""What a device must save, at least, to be chosen: bits may then depend on it."""
MARGIN: Final = 8
"""Times the memory that updates take there, which a device must have at least."""
Where = Literal["auto", "cpu", "device"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateShares:
    """How much of what the device updates, 0 to 1."""

    in_memory: float = 0.0
    """Of shards that stay in host memory."""
    on_disk: float = 0.0
    """Of those that are read and written."""
    why: str = ""
    """For people."""

    @property
    def any(self) -> bool:
        """Whether it updates at all."""
        return self.in_memory > 0 or self.on_disk > 0


ON_CPU: Final = UpdateShares()


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateTimes:
    """Seconds per element. What else crosses the link in a step is counted as if it did so meanwhile."""

    cpu: float
    device: float
    """Computing there."""
    up: float
    """To the device."""
    down: float
    other_up: float = 0.0
    """Weights, on their way to forward and backward."""
    other_down: float = 0.0
    """Gradients."""
    disk: float = 0.0
    """Reading and writing, where shards do not stay."""

    def at(self, share: float) -> float:
        """All of an update, when so much of it is the device's."""
        link = max(self.other_up + share * self.up, self.other_down + share * self.down) if share else 0.0
        return max((1 - share) * self.cpu, share * self.device, link, self.disk)

    def best(self) -> float:
        """The share with which it takes least; 0 where that saves less than GAIN."""
        found = min((part / PARTS for part in range(PARTS + 1)), key=lambda share: (self.at(share), share))
        return found if self.at(found) <= (1 - GAIN) * self.at(0.0) else 0.0


def choose(
    where: Where,
    cost: CostModel | None,
    work: UpdateWork,
    *,
    arrays: int,
    itemsize: int,
    shard_elements: int,
    needed_nbytes: int = 0,
    device_nbytes: int | None = None,
) -> UpdateShares:
    """What a device apart updates.

    Args:
        where: What the user says.
        cost: Of the machine; None where it has not been calibrated: the CPU then.
        work: Of the optimizer.
        arrays: Of a shard: masters and states, in fp32.
        itemsize: Bytes of a weight, and of its gradient.
        shard_elements: Of what is sent at a time.
        needed_nbytes: Of device memory, to update there.
        device_nbytes: Of device memory for all: where that is less than MARGIN times as much, weights have it. None
            where it is not known.
    """
    if where == "cpu":
        return UpdateShares(why="updates on the CPU, as asked for")
    if where == "device":
        return UpdateShares(in_memory=1.0, on_disk=1.0, why="updates on the device, as asked for")
    if cost is None:
        return UpdateShares(
            why='updates on the CPU: what the device would save is not known; penstock calibrate, or update_on="device"'
        )
    if cost.hardware.gpu is None or cost.hardware.emulated:
        return UpdateShares(why="updates on the CPU, which an emulated device is as well")
    if device_nbytes is not None and MARGIN * needed_nbytes > device_nbytes:
        return UpdateShares(why="updates on the CPU: the device's memory is small, and weights have it")
    kept = times(cost, work, arrays=arrays, itemsize=itemsize, shard_elements=shard_elements, checked=False)
    read = times(cost, work, arrays=arrays, itemsize=itemsize, shard_elements=shard_elements, checked=True)
    shares = UpdateShares(in_memory=kept.best(), on_disk=read.best())
    return UpdateShares(in_memory=shares.in_memory, on_disk=shares.on_disk, why=_reason(shares, kept, read))


def check_where(where: str) -> None:
    """See that a user's choice is one.

    Raises:
        UsageError: it is not.
    """
    if where not in get_args(Where):
        raise UsageError(f"update_on is {where!r}: use {', '.join(get_args(Where))}")


def times(
    cost: CostModel, work: UpdateWork, *, arrays: int, itemsize: int, shard_elements: int, checked: bool
) -> UpdateTimes:
    """What an element takes; `checked`: of a shard that is read and written, with checksums by the CPU."""
    sub_chunk = update_s(work, cost, work.elements, arrays=arrays)
    cpu = sub_chunk / work.elements / cost.hardware.sharing.compute_while_copying
    nbytes = 4 * arrays + itemsize
    link = cost.hardware.link
    duplex = 1.0 if link is None else link.duplex
    checks = disk = 0.0
    if checked:
        checks = checks_s(cost, 4 * arrays)
        disk = cost.read_s(4 * arrays, CHUNK) + cost.write_s(4 * arrays, CHUNK)
    request = 4.0 * shard_elements
    return UpdateTimes(
        cpu=cpu + checks,
        device=max(update_there_s(work, cost, shard_elements) / shard_elements, checks),
        up=cost.copy_s(nbytes, request) / duplex,
        down=cost.copy_s(nbytes, request, back=True) / duplex,
        other_up=2 * cost.copy_s(itemsize, CHUNK) / duplex,
        other_down=cost.copy_s(itemsize, CHUNK, back=True) / duplex,
        disk=disk,
    )


def _reason(shares: UpdateShares, kept: UpdateTimes, read: UpdateTimes) -> str:
    if not shares.any:
        return "updates on the CPU, which is not slower than the link to the device"
    part, each = (shares.in_memory, kept) if shares.in_memory else (shares.on_disk, read)
    which = "" if shares.in_memory else " of those whose states are on disk"
    return (
        f"updates: {part:.0%}{which} on the device, the rest on the CPU meanwhile; by this machine's calibration "
        f"{1e9 * each.at(part):.2g} s per billion parameters, and {1e9 * each.at(0.0):.2g} s on the CPU alone"
    )
