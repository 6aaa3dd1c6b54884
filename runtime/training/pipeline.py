"""Reading, changing and writing shards, three at a time: while one is changed the next is read and the last is written.

Bytes: every array of a shard is read once and written once, 12 and 12 per parameter with AdamW; of shards that stay in
host memory nothing is. The bound of a run over all shards is max(work, bytes / mixed rate of the drive); three buffers
reach it as long as work and transfers of a shard take about as long as those of the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

import torch

from ...memory.arena import PAGE, HostArena, Slot, round_up
from ...memory.disk import DiskEngine
from ...memory.errors import StallError
from ...memory.store import BlockStore
from ...memory.transfer import Transfer
from .residents import MakeArena, ResidentShards
from .shardfiles import ShardFiles
from .shards import Shard
from .watch import STALL_S, WATCH_S, Watch

logger = logging.getLogger(__name__)
BUFFERS: Final = 4
"""Shards in memory: one that is changed, one on each side of it, and one that lets a slow one catch up."""

Work = Callable[[Shard, Sequence[torch.Tensor]], None]
"""Changes the arrays of a shard in place: fp32, [elements] each."""
Finish = Callable[[], None]
"""Waits for work that goes on elsewhere: afterwards the arrays have changed."""


class Elsewhere(Protocol):
    """Work on some shards that goes on while others are worked on."""

    @property
    def at_once(self) -> int:
        """How many at a time; fewer than BUFFERS."""

    def takes(self, shard: Shard) -> bool:
        """Whether this shard is one of them."""

    def waits(self, shard: Shard) -> bool:
        """Whether all that is elsewhere has to end before this shard is worked on, there or here."""

    def begin(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> Finish:
        """Begin; the arrays are left alone until what is returned has returned."""


def _plain_arena(nbytes: int, tier: str) -> HostArena:
    return HostArena(nbytes, tier=tier)


class Pending(Protocol):
    """What is read ahead beside a shard."""

    def wait(self) -> None:
        """Wait for it, and raise what it met."""

    def cancel(self) -> None:
        """Give it up; nothing touches the memory afterwards."""


Beside = Callable[[Shard, memoryview], Pending | None]
"""Begins to read what the work on a shard needs beside it, into memory of the buffer; None where it needs nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Ahead:
    """A shard that was taken."""

    shard: Shard
    slot: Slot
    raw: memoryview
    """Its arrays: in the slot, or where it stays."""
    reading: Transfer | None
    beside: Pending | None

    def give_up(self) -> None:
        """Wait until nobody writes to its memory any more."""
        if self.reading is not None:
            self.reading.cancel()
            with suppress(Exception):  # what it met is of no interest any more
                self.reading.wait(STALL_S)
        if self.beside is not None:
            self.beside.cancel()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Away:
    """A shard that is worked on elsewhere."""

    taken: _Ahead
    finish: Finish
    turn: int
    """How many had been worked on, with it."""


class ShardPipeline:
    """Carries work out on shards of a block store, from one thread at a time.

    Args:
        store: Where they are; block i is shard i.
        engine: Reads and writes.
        shards: All there are.
        arrays: How many each has.
        kept: The numbers of those that stay in host memory.
        beside_nbytes: Memory for what is read beside a shard.
        make_arena: Makes the memory, of so many bytes and that name.
        watch_s: How often a wait is reported.
        stall_s: How long one may last without a byte moved.
    """

    def __init__(
        self,
        *,
        store: BlockStore,
        engine: DiskEngine,
        shards: Sequence[Shard],
        arrays: int,
        kept: Collection[int] = (),
        beside_nbytes: int = 0,
        make_arena: MakeArena = _plain_arena,
        watch_s: float = WATCH_S,
        stall_s: float = STALL_S,
    ) -> None:
        self._shards = shards
        self._arrays = arrays
        self._files = ShardFiles(store, engine, watch_s=watch_s, stall_s=stall_s)
        self._residents = ResidentShards(self._files, shards, kept, arrays, make_arena)
        self._beside_at = max((arrays * shard.array_nbytes for shard in shards if shard.id not in kept), default=0)
        each = max(self._beside_at + round_up(beside_nbytes), PAGE)
        self._arena = make_arena(BUFFERS * each, "shards")
        self._free = deque(self._arena.cut(each) for _ in range(BUFFERS))

    @property
    def arenas(self) -> tuple[HostArena, ...]:
        """The host memory that it takes: what shards stay in, if any does. What they pass through is small."""
        return () if self._residents.arena is None else (self._residents.arena,)

    @property
    def moving_nbytes(self) -> int:
        """Of the shards that an update of all of them reads, and writes."""
        return sum(self._arrays * shard.array_nbytes for shard in self._shards if shard not in self._residents)

    @property
    def staying_nbytes(self) -> int:
        """Of those that stay in host memory, and are written by commits."""
        return sum(self._arrays * shard.array_nbytes for shard in self._shards if shard in self._residents)

    @staticmethod
    def needed_nbytes(sizes: Iterable[int]) -> int:
        """What it would take for shards of so many bytes of which none stays, with nothing beside them."""
        return BUFFERS * max(sizes)

    def run(
        self,
        take: Callable[[], int | None],
        work: Work,
        *,
        new: bool = False,
        write: bool = True,
        beside: Beside | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Work on shards until there are no more; returns when the last has been written.

        Args:
            take: Gives the id of the next shard, or None where there is none now. It must not wait. A shard may come
                again when the work on it has been done, whether it has been written or not.
            work: What to do with each.
            new: They are not there yet: nothing is read, and the arrays start as zeros.
            write: Write them back. Without, they are only looked at.
            beside: What is to be read with each.
            elsewhere: Works on some of them, in the place of `work`.

        Raises:
            PenstockError: a shard could not be read or written, or is damaged.
        """
        ahead: deque[_Ahead] = deque()
        away: deque[_Away] = deque()
        turn = 0
        try:
            while self._read_ahead(take, ahead, new, beside) or away:
                if away and elsewhere is not None and _ends(away, ahead, elsewhere, turn):
                    gone = away.popleft()
                    self._end(gone.taken, gone.finish, write)
                    continue
                taken = ahead.popleft()
                turn += 1
                if elsewhere is not None and elsewhere.takes(taken.shard):
                    away.append(self._send_away(taken, elsewhere, new, write, turn))
                else:
                    self._end(taken, partial(self._work, taken, work, new, write), write)
        except BaseException:
            for gone in away:
                with suppress(Exception):  # the first one is told
                    gone.finish()
                self._drop(gone.taken)
            for taken in ahead:
                self._drop(taken)
            try:
                self._all_back()
            except StallError as error:
                logger.warning("%s", error)
            raise
        self._all_back()
        self._files.raise_error()

    def write_out(self) -> None:
        """Begin to write what stays in host memory and has changed: a commit from now on has it. See `ResidentShards`.

        Raises:
            PenstockError: the store stopped, or a write failed.
        """
        self._residents.write_out()

    def settle(self) -> None:
        """Wait until that is on disk: before the drive's threads are stopped."""
        self._residents.settle()

    def _read_ahead(
        self, take: Callable[[], int | None], ahead: deque[_Ahead], new: bool, beside: Beside | None
    ) -> bool:
        """Start reading as many as there are buffers for, one at least. Whether there is anything to work on."""
        while (slot := self._take(wait=not ahead)) is not None:
            number = take()
            if number is None:
                self._give_back(slot)
                break
            try:
                ahead.append(self._begin(self._shards[number], slot, new, beside))
            except BaseException:  # the drive's threads have been stopped, for one
                self._give_back(slot)
                raise
        return bool(ahead)

    def _begin(self, shard: Shard, slot: Slot, new: bool, beside: Beside | None) -> _Ahead:
        stays = shard in self._residents
        if stays:
            self._residents.hurry(shard)
        raw = self._residents.view(shard) if stays else self._arena.view(slot.offset, self._arrays * shard.array_nbytes)
        reading = None if new or (stays and self._residents.has(shard)) else self._files.read(shard, raw)
        taken = _Ahead(shard=shard, slot=slot, raw=raw, reading=reading, beside=None)
        if beside is None:
            return taken
        try:
            room = self._arena.view(slot.offset + self._beside_at, slot.nbytes - self._beside_at)
            return replace(taken, beside=beside(shard, room))
        except BaseException:
            taken.give_up()
            raise

    def _work(self, taken: _Ahead, work: Work, new: bool, write: bool) -> None:
        self._bring(taken, new, write)
        work(taken.shard, arrays_of(taken.raw, taken.shard, self._arrays))

    def _send_away(self, taken: _Ahead, elsewhere: Elsewhere, new: bool, write: bool, turn: int) -> _Away:
        try:
            self._bring(taken, new, write)
            finish = elsewhere.begin(taken.shard, arrays_of(taken.raw, taken.shard, self._arrays))
        except BaseException:
            self._drop(taken)
            raise
        return _Away(taken=taken, finish=finish, turn=turn)

    def _end(self, taken: _Ahead, finish: Finish, write: bool) -> None:
        """Finish the work on a shard, and begin to write it."""
        writing = False
        try:
            finish()
            self._files.worked += 1
            if write and taken.shard in self._residents:
                self._residents.changed(taken.shard)
            elif write:
                span = self._files.begin(taken.shard)
                writing = True
                self._files.write(taken.shard, span, taken.raw, partial(self._give_back, taken.slot))
        finally:
            if not writing:  # the write gives it back
                self._drop(taken)

    def _bring(self, taken: _Ahead, new: bool, write: bool) -> None:
        """Wait until a shard is there, and may be changed."""
        shard, stays = taken.shard, taken.shard in self._residents
        if new:
            taken.raw[:] = bytes(len(taken.raw))
        elif taken.reading is not None:
            self.watch.transfer(
                taken.reading, lambda: f"an update waits for shard {shard.id} to be read; {self.report()}"
            )
            self._files.check(shard, taken.raw)
            if stays:
                self._residents.loaded(shard)
        if taken.beside is not None:
            taken.beside.wait()
        if stays and write:
            self._residents.wait_unwritten(shard)

    def _take(self, *, wait: bool) -> Slot | None:
        with self._files.changed:
            if wait:
                self._files.wait_for(
                    lambda: self._files.failed or bool(self._free), "the next shard waits for a buffer"
                )
            self._files.raise_error()
            return self._free.popleft() if self._free else None

    def _drop(self, taken: _Ahead) -> None:
        """Give a buffer back as soon as nothing is read into it any more."""
        if taken.beside is not None:
            taken.beside.cancel()
        if taken.reading is None:
            self._give_back(taken.slot)
        else:
            taken.reading.cancel()
            taken.reading.add_done_callback(lambda _: self._give_back(taken.slot))

    @property
    def watch(self) -> Watch:
        """For all waits of a training that end when shards move on."""
        return self._files.watch

    def report(self) -> str:
        """Where shards are, for who waits."""
        return f"{len(self._free)} of {BUFFERS} buffers are free, {self._files.report()}"

    def _give_back(self, slot: Slot) -> None:
        with self._files.changed:
            self._free.append(slot)
            self._files.changed.notify_all()

    def _all_back(self) -> None:
        with self._files.changed:
            self._files.wait_for(lambda: len(self._free) == BUFFERS, "the last shards are to be written")

    def close(self) -> None:
        """Give the memory back, unless a drive that hangs may still write into it."""
        if len(self._free) == BUFFERS:
            self._residents.close()
            self._arena.close()


def arrays_of(raw: memoryview, shard: Shard, count: int) -> list[torch.Tensor]:
    """The arrays of a shard, [elements] each, as views of its bytes."""
    assert shard.array_nbytes % PAGE == 0
    return [
        torch.frombuffer(raw, dtype=torch.float32, count=shard.elements, offset=index * shard.array_nbytes)
        for index in range(count)
    ]


def _ends(away: Sequence[_Away], ahead: Sequence[_Ahead], elsewhere: Elsewhere, turn: int) -> bool:
    """Whether the oldest that is elsewhere has to end before the next shard is worked on.

    What is left of another block is not to wait until lanes are needed: somebody may wait for that block.
    """
    if not ahead:
        return True
    oldest, following = away[0], ahead[0].shard
    late = following.block != oldest.taken.shard.block and turn >= oldest.turn + elsewhere.at_once
    crowded = elsewhere.takes(following) and len(away) >= elsewhere.at_once
    return late or crowded or elsewhere.waits(following)
