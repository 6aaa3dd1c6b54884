"""The last steps, which load and offload share: book the memory, carry the layout out, and hand the model over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..memory.capacity import disk_capacity
from ..memory.errors import DiskError
from ..memory.scratch import Scratch, process_scratch
from ..scheduler.plan import Plan
from .backing import Backing
from .build import Machinery
from .devices.base import Device
from .export import Exporter
from .handle import Handle, refuse_moves
from .layout import Changing, Layout
from .profiler.environment import start_if_asked
from .profiler.registry import process_registry
from .tiers import reserve


def launch(
    module: nn.Module,
    *,
    owner: str,
    device: Device,
    layout: Layout,
    plan: Callable[[], Plan],
    backing: Backing,
    export_folder: str,
    held: ExitStack,
    freed_nbytes: int = 0,
    changing: Changing | None = None,
) -> None:
    """Start streaming a module, or fill it for good where everything fits, and give it its handle.

    Args:
        owner: The model's name in the ledger.
        plan: Makes the plan once the scratch files are written: their drive may have to be measured.
        export_folder: Where `state_dict` maps what it has to assemble.
        held: What must be closed with the model: the device, scratch folders. It is emptied; the model owns it from
            now on, or it is closed where this fails.
        freed_nbytes: Host memory that the module gives up on the way.
        changing: It is to be trained: weights are leased even where all of them stay.

    Raises:
        DoesNotFitError: the memory is not there, or other models have reserved it. Nothing was loaded.
        UsageError: PENSTOCK_PROFILE names a file that is there. Nothing was loaded.
    """
    booked = reserve(
        owner, device, host_nbytes=layout.host_nbytes, device_nbytes=layout.device_nbytes, freed_nbytes=freed_nbytes
    )
    for reservation in booked:
        held.callback(reservation.release)
    start_if_asked()  # here, where a file that is there already costs a built module nothing
    machinery = Machinery(
        device=device, layout=layout, backing=backing, module=module, share=booked[0], changing=changing
    )
    machinery.on_close(held.pop_all().close)
    try:
        if layout.resident and changing is None:
            machinery.load_all(module)
            if layout.back is not None:  # the weights only passed through the host
                booked[0].give_back(layout.back.nbytes)
        else:
            machinery.start(module)
            Exporter(machinery, backing, export_folder).install(module)
            refuse_moves(module, device.torch_device)
            generation: Any = getattr(module, "generation_config", None)
            if generation is not None:  # generate() compiles the forward for static caches; leases cannot be traced
                generation.disable_compile = True
        machinery.plan = plan()
        module.penstock = Handle(module, machinery.plan, machinery)  # type: ignore[assignment]
        process_registry().add(module, machinery)
    except BaseException:
        machinery.close()
        raise


def open_scratch(folders: Sequence[str], held: ExitStack) -> list[Scratch]:
    """A scratch folder on each drive that was named, or the default one, to be closed with `held`.

    Raises:
        ScratchBusyError: another process uses one of them.
    """
    return [held.enter_context(process_scratch().open(folder)) for folder in folders or (None,)]


def scratch_files(scratches: Sequence[Scratch], name: str) -> list[str]:
    """A file of that name in each scratch folder."""
    return [os.path.join(scratch.path, name) for scratch in scratches]


def check_room(scratches: Sequence[Scratch], needed_nbytes: int, budget: int | None) -> None:
    """Refuse before anything is written what is spread evenly over scratch folders and does not fit there.

    Raises:
        DiskError: a filesystem has less than its share free, or all of it is more than the disk budget.
    """
    sharing = Counter(os.stat(scratch.path).st_dev for scratch in scratches)
    for scratch in scratches:
        share = -(-needed_nbytes * sharing[os.stat(scratch.path).st_dev] // len(scratches))
        free = disk_capacity(scratch.path).free_nbytes
        if share > free:
            raise DiskError(
                f"{share} bytes of weights go to {scratch.path}, where {free} bytes are free: free space there, or "
                f"name another folder with disk=… (--disk)"
            )
    if budget is not None and needed_nbytes > budget:
        raise DiskError(
            f"{needed_nbytes} bytes of weights go to disk; the disk budget is {budget} bytes: raise it, "
            f"max_memory={{'disk': {needed_nbytes}}} (--max-memory disk={-(-needed_nbytes // 2**20)}MiB)"
        )
