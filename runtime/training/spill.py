"""Gradients that have no room in host memory: in a scratch file, from the backward that makes them to their update.

Backward copies each into a ring of buffers and goes on; the disk engine writes it from there, shard piece by shard
piece, each piece on pages of its own. The update reads the pieces of a shard ahead, beside its masters and states. It
is scratch: nothing is durable or summed up, but a write that fails is raised before any weight has changed.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch

from ...kernels.zeros import all_zero
from ...memory.arena import HostArena, Slot, round_up
from ...memory.disk import DiskEngine
from ...memory.errors import ClosedError, DiskError, DoesNotFitError
from ...memory.files import disk_error
from ...memory.image import whole_window
from ...memory.transfer import Transfer
from .shards import Piece, Shard
from .spillread import GradientRead, lost
from .watch import STALL_S, WATCH_S, Watch

RING: Final = 4
"""Buffers that gradients are written from, and added up through; a piece of a shard each."""
WIDE: Final = 4
"""Bytes of an element, at most: sums are fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a piece of a gradient lies."""

    piece: Piece
    block: int
    path: str
    offset: int


class GradientSpill:
    """A place on disk for the gradients of some parameters.

    Args:
        names: Of all trained parameters.
        spilled: The numbers of those whose gradients go to disk.
        shards: Of all.
        engine: Reads and writes.
        paths: Scratch files, one per drive; shards take turns. Their room is taken now.
        watch_s: How often a wait is reported.
        stall_s: How long one may last without a byte moved.

    Raises:
        DoesNotFitError: a drive is too small.
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        names: Sequence[str],
        spilled: Collection[int],
        shards: Sequence[Shard],
        *,
        itemsizes: Sequence[int],
        engine: DiskEngine,
        paths: Sequence[str],
        watch_s: float = WATCH_S,
        stall_s: float = STALL_S,
    ) -> None:
        """`itemsizes`: bytes of an element of each parameter's gradient, at most."""
        self._names = names
        self._spilled = frozenset(spilled)
        self._engine = engine
        self._watch = Watch(self._moved, watch_s=watch_s, stall_s=stall_s)
        self._itemsizes = itemsizes
        self._places: dict[int, list[_Place]] = {index: [] for index in self._spilled}
        self._by_shard: dict[int, dict[int, _Place]] = {}
        self._blocks: dict[int, int] = {}
        ends = [0] * len(paths)
        for turn, shard in enumerate(shards):
            drive = turn % len(paths)
            for piece in shard.pieces:
                if piece.parameter in self._spilled:
                    place = _Place(piece=piece, block=shard.block, path=paths[drive], offset=ends[drive])
                    ends[drive] += self._piece_nbytes(piece)
                    self._places[piece.parameter].append(place)
                    self._by_shard.setdefault(shard.id, {})[piece.parameter] = place
        for path, nbytes in zip(paths, ends, strict=True):
            _take_room(path, nbytes)
        each = max(self._piece_nbytes(place.piece) for places in self._places.values() for place in places)
        self._arena = HostArena(RING * each, tier="gradients on their way")
        self._free = deque(self._arena.cut(each) for _ in range(RING))
        self._dtypes: dict[int, torch.dtype] = {}
        """Of what was written last."""
        self._changed = threading.Condition()
        self._zero: dict[Piece, bool] = {}
        """Of pieces of parameters that hold experts: whether there was nothing but zeros in what was written last."""
        self.watched: frozenset[int] = frozenset()
        """Those parameters."""
        self._under_way: Counter[int] = Counter()
        """Writes that have not landed, by parameter."""
        self._error: Exception | None = None
        self.waited_s = 0.0
        """That the thread which trains has waited for gradients on their way."""

    def __contains__(self, index: int) -> bool:
        """Whether the gradient of a parameter goes to disk."""
        return index in self._spilled

    @property
    def nbytes(self) -> int:
        """Of all places: what one pass writes at most."""
        return sum(self._piece_nbytes(place.piece) for places in self._places.values() for place in places)

    def _piece_nbytes(self, piece: Piece) -> int:
        return round_up(piece.elements * self._itemsizes[piece.parameter])

    def beside_nbytes(self, shard: Shard) -> int:
        """What the pieces of a shard take in memory."""
        return sum(self._piece_nbytes(place.piece) for place in self._by_shard.get(shard.id, {}).values())

    # --- in backward --------------------------------------------------------------------------------------------------

    def put(self, index: int, flat: torch.Tensor) -> None:
        """Take a gradient away; returns when it may be changed, which is before it is on disk.

        Raises:
            DiskError: this or an earlier one cannot be written. All gradients of the step are worth nothing.
        """
        with self._noted(index):
            self._await_written(index)
            self._dtypes[index] = flat.dtype
            for place in self._places[index]:
                values = flat[place.piece.start : place.piece.stop]
                if index in self.watched:
                    self._zero[place.piece] = all_zero(values)
                self._write_piece(index, place, values)

    def is_zero(self, piece: Piece) -> bool:
        """Whether there is nothing but zeros in a piece of a parameter that is watched, as it was written last."""
        return self._zero[piece]

    def _write_piece(self, index: int, place: _Place, values: torch.Tensor) -> None:
        slot = self._take(index)
        try:
            raw = self._arena.view(slot.offset, round_up(values.nbytes))
            torch.frombuffer(raw, dtype=values.dtype, count=len(values)).copy_(values)
            transfer = self._engine.write(place.path, place.offset, raw)
        except BaseException:
            self._give_back(slot)
            raise
        with self._changed:
            self._under_way[index] += 1
        transfer.add_done_callback(lambda done: self._landed(index, slot, done))

    def _landed(self, index: int, slot: Slot, transfer: Transfer) -> None:
        error = transfer.error
        if error is None and transfer.cancelled:
            error = ClosedError("the model was closed while gradients were being written")
        with self._changed:
            self._under_way[index] -= 1
            self._free.append(slot)
            if error is not None:
                self._error = self._error or self._as_ours(index, error)
            self._changed.notify_all()

    def load(self, index: int, out: torch.Tensor) -> None:
        """Read one back into `out`, flat; values are converted to its dtype.

        Raises:
            DiskError: it, or an earlier one, cannot be read or written.
        """
        with self._noted(index):
            for piece, there in self._read_back(index):
                out[piece.start : piece.stop].copy_(there)

    def get(self, index: int) -> torch.Tensor:
        """One in memory that is made for it. Raises as `load` does."""
        places = self._places[index]
        out = torch.empty(places[-1].piece.stop, dtype=self._dtypes[index])
        self.load(index, out)
        return out

    def _read_back(self, index: int) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The pieces of one, in order, each until the next is asked for; read ahead as far as there are buffers."""
        self._await_written(index)
        left, ahead = deque(self._places[index]), deque[tuple[_Place, Slot, Transfer]]()
        try:
            while left or ahead:
                while left and (slot := self._take(index) if not ahead else self._take_free()) is not None:
                    place = left.popleft()
                    try:
                        ahead.append((place, slot, self._read_piece(index, place, slot)))
                    except BaseException:
                        self._give_back(slot)
                        raise
                place, slot, transfer = ahead[0]
                with self._waiting():
                    self._watch.transfer(transfer, lambda: f"backward waits for {self._label(index)} to be read back")
                raw = self._arena.view(slot.offset, slot.nbytes)
                yield place.piece, torch.frombuffer(raw, dtype=self._dtypes[index], count=place.piece.elements)
                ahead.popleft()
                self._give_back(slot)
        finally:
            for _, slot, transfer in ahead:  # a buffer comes back when nothing is read into it any more
                transfer.cancel()
                transfer.add_done_callback(partial(self._done_with, slot))

    def _read_piece(self, index: int, place: _Place, slot: Slot) -> Transfer:
        nbytes = round_up(place.piece.elements * self._dtypes[index].itemsize)
        window = whole_window(place.path, place.offset, nbytes)
        return self._engine.read([window], [], self._arena.view(slot.offset, nbytes))

    # --- between backward and the update ------------------------------------------------------------------------------

    def settle(self, only: Collection[int] | None = None) -> None:
        """Wait until all that was taken away is on disk, or what was of some parameters.

        Raises:
            DiskError: some of it cannot be written. All gradients of the step are worth nothing.
        """

        def landed() -> bool:
            if only is None:
                return not self._under_way.total()
            return not any(self._under_way[index] for index in only)

        self._await(landed, "the end of a step waits for gradients to be on disk")

    def forget(self) -> None:
        """Nothing of it is wanted any more, what failed included.

        Raises:
            StallError: a write does not end.
        """
        with self._changed:
            self._watch.wait(
                lambda s: self._changed.wait_for(lambda: not self._under_way.total(), timeout=s),
                lambda: f"gradients that are not wanted any more wait for their writes; {self._report()}",
            )
            self._error = None

    # --- in the update ------------------------------------------------------------------------------------------------

    def read(self, shard: Shard, wanted: Collection[int], into: memoryview) -> GradientRead | None:
        """Begin to read the pieces of a shard.

        Args:
            shard: Whose.
            wanted: Parameters that have a gradient on disk.
            into: At least `beside_nbytes`, on a page.

        Returns:
            What there will be; None where none of its pieces is wanted.
        """
        windows, tensors, names, at = [], {}, [], 0
        for index, place in self._by_shard.get(shard.id, {}).items():
            if index not in wanted:
                continue
            dtype, elements = self._dtypes[index], place.piece.elements
            nbytes = round_up(elements * dtype.itemsize)
            window = whole_window(place.path, place.offset, nbytes)
            windows.append(replace(window, offset=at, data_offset=at, final_offset=at))
            tensors[index] = torch.frombuffer(into, dtype=dtype, count=elements, offset=at)
            names.append(self._label(index))
            at += nbytes
        if not windows:
            return None
        return GradientRead(self._engine.read(windows, [], into), tensors, names[0], self._watch)

    # --- buffers and errors -------------------------------------------------------------------------------------------

    def _await_written(self, index: int) -> None:
        self._await(lambda: not self._under_way[index], f"{self._label(index)} waits for its own write")

    def _take(self, index: int) -> Slot:
        self._await(lambda: bool(self._free), f"{self._label(index)} waits for a buffer")
        slot = self._take_free()
        assert slot is not None  # one thread takes
        return slot

    def _take_free(self) -> Slot | None:
        with self._changed:
            return self._free.popleft() if self._free else None

    def _done_with(self, slot: Slot, _: Transfer) -> None:
        self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for something. As long as anything moves, nothing is stalled.

        Raises:
            DiskError: what a write met.
            StallError: nothing moves any more.
        """
        with self._changed:
            if not ready() and self._error is None:
                with self._waiting():
                    self._watch.wait(
                        lambda s: self._changed.wait_for(lambda: ready() or self._error, timeout=s),
                        lambda: f"{what}; {self._report()}",
                    )
            if self._error is not None:
                raise self._error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - began

    def _moved(self) -> int:
        statistics = self._engine.statistics()
        return statistics.read_nbytes + statistics.written_nbytes

    def _report(self) -> str:
        """What is being written, for who waits."""
        with self._changed:
            writing = ", ".join(self._names[index] for index, count in self._under_way.items() if count) or "none"
            free = len(self._free)
        paths = ", ".join(sorted({place.path for places in self._places.values() for place in places}))
        return f"{free} of {RING} buffers are free, gradients being written to {paths}: {writing}"

    @contextmanager
    def _noted(self, index: int) -> Iterator[None]:
        """Where this fails, gradients of the step are lost, and whatever comes next is told so."""
        try:
            yield
        except Exception as error:
            ours = error if error is self._error else self._as_ours(index, error)
            with self._changed:
                self._error = self._error or ours
            if ours is error:
                raise
            raise ours from error

    def _as_ours(self, index: int, error: Exception) -> Exception:
        return lost(self._label(index), error) if isinstance(error, DiskError) else error

    def _label(self, index: int) -> str:
        return f"the gradient of {self._names[index]} (block {self._places[index][0].block})"

    def close(self) -> None:
        """Give the memory back, unless a drive that hangs may still touch it. The files go with the scratch folder."""
        if len(self._free) == RING:
            self._arena.close()


def _take_room(path: str, nbytes: int) -> None:
    """Make a scratch file and take all its room from the drive, so that a full one is met now and not in backward."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if nbytes:
                os.posix_fallocate(fd, 0, nbytes)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error("allocate", path, 0, nbytes, error) from error
        free = shutil.disk_usage(os.path.dirname(path)).free
        raise DoesNotFitError(
            f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB) of gradients go to {path}, where {free} bytes "
            f"({free / 2**30:.2f} GiB) are free: free space there, name another folder, or several, with disk=… "
            "(--disk), or give more host memory, which keeps gradients: max_memory={'host': …}",
            tier="disk",
            needed_nbytes=nbytes,
            available_nbytes=free,
        ) from error
