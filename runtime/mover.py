"""The executor's hands: the disk engine and a device, behind the scheduler's `Mover` protocol."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ..memory.arena import HostArena, Slot
from ..memory.disk import DiskEngine
from ..memory.image import DeviceImage, Image
from ..memory.transfer import Transfer
from ..scheduler.mover import Event
from .devices.base import Device

WAITERS: Final = 4
"""Events that can be waited for at a time."""


class BlockMover:
    """Reads and copies blocks by their images."""

    def __init__(
        self,
        *,
        device: Device,
        engine: DiskEngine,
        images: Mapping[int, Image],
        device_images: Mapping[int, DeviceImage],
    ) -> None:
        self._device = device
        self._engine = engine
        self._images = images
        self._device_images = device_images
        self._waiters = ThreadPoolExecutor(max_workers=WAITERS, thread_name_prefix="penstock-event")
        self._moved = 0
        if device.separate:  # a pool starts its threads one by one, and a copy should not wait for that
            started = threading.Barrier(WAITERS)
            for _ in range(WAITERS):
                self._waiters.submit(started.wait)
        self.copied_nbytes = 0

    async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Callable[[int, int], None]) -> None:
        """Fill a host slot from disk."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def part(start: int, stop: int) -> None:
            _post(loop, on_data, start, stop)

        def finish(transfer: Transfer) -> None:
            if done.done():
                return
            if transfer.error is not None:
                done.set_exception(transfer.error)
            else:
                done.set_result(None)

        image = self._images[block]
        assert isinstance(slot.arena, HostArena)
        transfer = self._engine.read(
            image.windows,
            image.bounces,
            slot.arena.view(slot.offset, slot.nbytes),
            urgent=urgent,
            on_data=part if self._device.separate else None,
        )
        transfer.add_done_callback(lambda t: _post(loop, finish, t))
        try:
            await done
        except asyncio.CancelledError:
            transfer.cancel()  # chunks under way end before the engine closes, and the engine closes before the arena
            raise

    def before_copy(self, target: Slot) -> None:
        """Write after read: the copy stream waits for all that read the slot."""
        if target.guard is not None:
            self._device.copies_wait(target.guard)
            target.guard = None

    def copy(self, block: int, source: Slot, target: Slot, start: int, stop: int) -> None:
        """Enqueue the copy of a part of a block."""
        assert isinstance(source.arena, HostArena)
        for first, offset, nbytes in self._device_images[block].parts(start, stop):
            self._device.copy(source.arena, source.offset + first, target.arena, target.offset + offset, nbytes)
            self._moved += 1
            self.copied_nbytes += nbytes

    def copied(self) -> Event:
        """An event after the copies enqueued so far."""
        return self._device.copied()

    async def wait(self, event: Event) -> None:
        """Wait for an event in a helper thread."""
        if event is not None:
            await asyncio.get_running_loop().run_in_executor(self._waiters, self._device.wait, event)

    def poison(self, slot: Slot) -> None:
        """Fill a slot with NaN before it is refilled."""
        self._device.poison(slot.arena, slot.offset, slot.nbytes)

    def progress(self) -> int:
        """Grows with every chunk read and every part copied."""
        statistics = self._engine.statistics()
        return statistics.reads + statistics.writes + self._moved

    def close(self) -> None:
        """Stop the helper threads."""
        self._waiters.shutdown(wait=True)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """Have the loop call something; a loop that was closed meanwhile has nobody left who would care."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
