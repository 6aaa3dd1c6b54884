"""How much of an update a device apart is given: by `prepare` on the machine that it runs on, by a forecast on any."""

from __future__ import annotations

from ...scheduler.cost import CostModel
from ...scheduler.hardware import Hardware
from ...scheduler.updating import UpdateShares, Where, choose
from .deviceupdates import DeviceUpdates
from .loads import update_work
from .optimizers import OptimizerChoice
from .preparing import arrays_of
from .shards import ELEMENTS


def update_shares(
    where: Where, hardware: Hardware | None, choice: OptimizerChoice, *, itemsize: int, device_nbytes: int | None
) -> UpdateShares:
    """What the device updates.

    Args:
        where: What the user says.
        hardware: The machine; None where it has not been calibrated.
        choice: The optimizer.
        itemsize: Bytes of an element of the weights, and of their gradients.
        device_nbytes: Of device memory for all; None where it is not known.
    """
    arrays = arrays_of(choice)
    return choose(
        where,
        None if hardware is None else CostModel(hardware=hardware),
        update_work(choice),
        arrays=arrays,
        itemsize=itemsize,
        shard_elements=ELEMENTS,
        needed_nbytes=DeviceUpdates.needed_nbytes(ELEMENTS, arrays),
        device_nbytes=device_nbytes,
    )
