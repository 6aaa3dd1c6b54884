"""What bringing a block takes of the cores that compute, besides reading its bytes: the executor's Python.

Decisions, a task, two wake-ups of a loop: in a loop of their own they take 50 microseconds, between the products of a
model some hundreds, since nothing of them is in the caches then. Where computing takes all cores it waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from ...memory.arena import HostArena, Slot
from ...memory.image import Image, whole_window
from ...memory.requests import CHUNK, THREADS
from ...scheduler.core import Core
from ...scheduler.executor import Executor
from ...scheduler.order import AccessOrders
from ...scheduler.residence import Tier
from ...scheduler.timeline import Timeline
from ..devices.cpu import CpuDevice
from ..mover import BlockMover
from .disk import EngineMaker
from .diskload import ProbeFile

BLOCK_NBYTES: Final = 4 * 2**20
SLOTS: Final = 4
BLOCKS: Final = 12
LEAST: Final = 3
"""Rounds over all blocks, the first of which does not count: its order is learned."""


def serving_cost(
    file: ProbeFile,
    arena: HostArena,
    *,
    engines: EngineMaker,
    compute: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one core per block.

    Args:
        file: To read blocks from.
        arena: Memory for `SLOTS` blocks at least.
        engines: Makes the disk engine.
        compute: What is done with each block: some milliseconds in which every cache is filled with other things.
        seconds: About so long.
        clock: Seconds since any moment.
    """
    with ExitStack() as held:
        engine = engines(THREADS, CHUNK)
        held.callback(engine.close)
        images = {
            block: Image(
                nbytes=BLOCK_NBYTES,
                places={},
                windows=(whole_window(file.path, block * BLOCK_NBYTES, BLOCK_NBYTES),),
                bounces=(),
            )
            for block in range(min(BLOCKS, file.nbytes // BLOCK_NBYTES))
        }
        device = CpuDevice()
        held.callback(device.close)
        mover = BlockMover(device=device, engine=engine, images=images, device_images={})
        held.callback(mover.close)
        executor = Executor(_core(images, arena, mover), mover)
        held.callback(executor.close)
        executor.start()
        return _per_block(executor, tuple(images), compute, seconds, clock)


def _core(images: dict[int, Image], arena: HostArena, mover: BlockMover) -> Core:
    nbytes = {block: image.nbytes for block, image in images.items()}
    ring = [Slot(arena=arena, offset=number * BLOCK_NBYTES, nbytes=BLOCK_NBYTES) for number in range(SLOTS)]
    order = tuple(images)
    return Core(
        front=Tier(name="measuring", permanent={}, ring=ring, sizes=nbytes),
        back=None,
        nbytes=nbytes,
        mover=mover,
        orders=AccessOrders(lambda root: order, first=0),
        clock=time.monotonic_ns,
        timeline=Timeline(capacity=1),
        inflight_nbytes=SLOTS * BLOCK_NBYTES,
    )


def _per_block(
    executor: Executor,
    blocks: tuple[int, ...],
    compute: Callable[[], object],
    seconds: float,
    clock: Callable[[], float],
) -> float:
    start, rounds, spent_s = clock(), 0, 0.0
    while rounds < LEAST or clock() - start < seconds:
        before_s = executor.own_s()
        executor.begin(0)
        for block in blocks:
            lease = executor.acquire(block)
            compute()
            executor.release(lease)
        executor.end(failed=False)
        if rounds:
            spent_s += executor.own_s() - before_s
        rounds += 1
    return spent_s / ((rounds - 1) * len(blocks))
