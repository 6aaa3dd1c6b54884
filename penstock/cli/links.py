"""Measures each link of this machine for a moment: what `penstock doctor` tells of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ..memory.arena import HostArena
from ..memory.capacity import disk_capacity
from ..memory.disk import DiskEngine
from ..memory.errors import PenstockError
from ..memory.image import whole_window
from ..memory.transfer import Transfer
from .machine import LinkRate

FILE_NBYTES: Final = 256 * 2**20
PIECE: Final = 16 * 2**20
DEPTH: Final = 4
"""Pieces under way at once."""


def measure_links(folder: Path) -> tuple[LinkRate, ...]:
    """The rates of the links there are, in about a second. What cannot be measured is left out.

    Writes a file of 256 MiB to `folder` and reads it back, past the page cache, and removes it.
    """
    return (*_disk_links(folder), *_device_links())


def _disk_links(folder: Path) -> Iterator[LinkRate]:
    disk = disk_capacity(folder)
    if disk.in_memory or disk.free_nbytes < 2 * FILE_NBYTES:
        return
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="penstock-doctor-") as file:
            wrote, read = disk_rates(file.name, FILE_NBYTES)
    except (OSError, PenstockError):
        return  # the report says why, where it tells whether O_DIRECT works here
    yield LinkRate(link="disk→host", nbytes_per_s=read)
    yield LinkRate(link="host→disk", nbytes_per_s=wrote)


def disk_rates(path: str, nbytes: int) -> tuple[float, float]:
    """Bytes per second of writing `nbytes` to a file, on the disk for good, and of reading them back.

    Raises:
        DiskError: the file cannot be written or read.
    """
    arena = HostArena(DEPTH * PIECE, tier="measuring")
    engine = DiskEngine()
    try:
        _fill(arena)
        start = time.perf_counter()
        _in_pieces(nbytes, lambda at, n, into: engine.write(path, at, into[:n]), arena)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        written = time.perf_counter()
        _in_pieces(nbytes, lambda at, n, into: engine.read([whole_window(path, at, n)], [], into), arena)
        return nbytes / (written - start), nbytes / (time.perf_counter() - written)
    finally:
        engine.close()
        arena.close()


def _in_pieces(nbytes: int, submit: Callable[[int, int, memoryview], Transfer], arena: HostArena) -> None:
    pending: list[Transfer] = []
    for index, at in enumerate(range(0, nbytes, PIECE)):
        if len(pending) == DEPTH:
            pending.pop(0).wait()
        pending.append(submit(at, min(PIECE, nbytes - at), arena.view(index % DEPTH * PIECE, PIECE)))
    for transfer in pending:
        transfer.wait()


def _fill(arena: HostArena) -> None:
    """Bytes that no drive can squeeze."""
    noise = os.urandom(2**20)
    view = arena.view(0, arena.nbytes)
    for at in range(0, arena.nbytes, len(noise)):
        view[at : at + len(noise)] = noise


def _device_links() -> Iterator[LinkRate]:
    try:
        import torch
    except (ImportError, OSError):  # the report says so
        return
    if not torch.cuda.is_available():
        return
    from ..runtime.devices.cuda import CudaDevice
    from ..runtime.links import LinkCache, link_rate

    nowhere = LinkCache(Path(os.devnull, "links"))  # neither a rate of another day nor one to keep
    for index in range(torch.cuda.device_count()):
        device = CudaDevice(index)
        for link, back in ((f"host→{device.name}", False), (f"{device.name}→host", True)):
            rate = link_rate(device, nowhere, back=back)
            if rate is not None:
                yield LinkRate(link=link, nbytes_per_s=rate)
        device.close()
