"""What a byte of activations takes of the CPU on its way to disk and back, where the CPU is what computes.

Copies, checksums, the kernel's part of writing and reading, and the pages of the memory that it comes back to: seconds
of a core each, whichever thread spends them. They are seconds that no core computes in.
"""

from __future__ import annotations

import os
import time
from typing import Final

import torch

from ...memory.disk import DiskEngine
from ...memory.image import whole_window
from ...memory.store.checksum import checksum
from .hold import flat_of
from .store import ActivationStore

ROUNDS: Final = 4
"""The least of these counts: whatever else the process is at is no part of it."""


def carrying_byte_s(store: ActivationStore, engine: DiskEngine, path: str) -> float:
    """Measure it, by carrying a buffer there and back; a few milliseconds.

    Args:
        store: Whose buffers; nothing moves yet.
        engine: Reads and writes.
        path: A scratch file, of which the beginning is written to.

    Returns:
        Seconds of all cores for a byte: with n of them, computing waits for an n-th of that.

    Raises:
        DiskError: the file cannot be written or read.
    """
    slot = store.out_buffers[0]
    raw = store.arena.view(slot.offset, slot.nbytes)
    kept = torch.frombuffer(raw, dtype=torch.uint8, count=slot.nbytes)
    storage = torch.zeros(slot.nbytes, dtype=torch.uint8).untyped_storage()
    found = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        kept.copy_(flat_of(storage))
        checksum(raw)
        engine.write(path, 0, raw).wait()
        engine.read([whole_window(path, 0, slot.nbytes)], [], raw).wait()
        checksum(raw)
        storage = torch.empty(slot.nbytes, dtype=torch.uint8).untyped_storage()
        flat_of(storage).copy_(kept)
        found.append(time.process_time() - begun)
    return min(found) / slot.nbytes


def cores() -> int:
    """That computing and carrying share."""
    return max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
