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
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

import torch

from ...memory.arena import HostArena, Slot, round_up
from ...memory.disk import DiskEngine, Transfer
from ...memory.errors import ClosedError, DiskError, DoesNotFitError, StallError
from ...memory.files import disk_error
from ...memory.image import whole_window
from .shards import Piece, Shard
from .watch import failure_of

RING: Final = 4
"""Buffers that gradients are written from, and added up through; a piece of a shard each."""
STALL_S: Final = 120.0
WIDE: Final = 4
"""Bytes of an element, at most: sums are fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a piece of a gradient lies."""

    piece: Piece
    block: int
    path: str
    offset: int


class GradientRead:
    """Pieces of one shard on their way back."""

    def __init__(self, transfer: Transfer, tensors: Mapping[int, torch.Tensor], what: str) -> None:
        self.tensors = tensors
        """By parameter, flat: the elements of its piece. There when `wait` has returned."""
        self._transfer = transfer
        self._what = what

    def wait(self) -> None:
        """Wait for it.

        Raises:
            DiskError: it cannot be read.
        """
        try:
            if not self._transfer.wait(STALL_S):
                raise _stalled(self._what)
            _check_whole(self._transfer)
        except DiskError as error:
            raise _lost(self._what, error) from error

    def cancel(self) -> None:
        """Give it up, and wait until nothing is written to memory any more."""
        self._transfer.cancel()
        with suppress(Exception):  # what it met is of no interest any more
            self._transfer.wait(STALL_S)


class GradientSpill:
    """A place on disk for the gradients of some parameters.

    Args:
        names: Of all trained parameters.
        spilled: The numbers of those whose gradients go to disk.
        shards: Of all.
        engine: Reads and writes.
        paths: Scratch files, one per drive; shards take turns. Their room is taken now.

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
    ) -> None:
        """`itemsizes`: bytes of an element of each parameter's gradient, at most."""
        self._names = names
        self._spilled = frozenset(spilled)
        self._engine = engine
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
        self._under_way: Counter[int] = Counter()
        """Writes that have not landed, by parameter."""
        self._landings = 0
        self._error: Exception | None = None

    def __contains__(self, index: int) -> bool:
        """Whether the gradient of a parameter goes to disk."""
        return index in self._spilled

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
            self._await(lambda: not self._under_way[index], self._label(index))
            self._dtypes[index] = flat.dtype
            for place in self._places[index]:
                self._write_piece(index, place, flat[place.piece.start : place.piece.stop])

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
            self._landings += 1
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
        self._await(lambda: not self._under_way[index], self._label(index))
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
                if not transfer.wait(STALL_S):
                    raise _stalled(self._label(index))
                _check_whole(transfer)
                raw = self._arena.view(slot.offset, slot.nbytes)
                yield place.piece, torch.frombuffer(raw, dtype=self._dtypes[index], count=place.piece.elements)
                ahead.popleft()
                self._give_back(slot)
        finally:
            for _, slot, transfer in ahead:
                transfer.cancel()
                with suppress(Exception):
                    transfer.wait(STALL_S)
                self._give_back(slot)

    def _read_piece(self, index: int, place: _Place, slot: Slot) -> Transfer:
        nbytes = round_up(place.piece.elements * self._dtypes[index].itemsize)
        window = whole_window(place.path, place.offset, nbytes)
        return self._engine.read([window], [], self._arena.view(slot.offset, nbytes))

    # --- between backward and the update ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until all that was taken away is on disk.

        Raises:
            DiskError: some of it cannot be written. All gradients of the step are worth nothing.
        """
        self._await(lambda: not self._under_way.total(), "gradients")

    def forget(self) -> None:
        """Nothing of it is wanted any more, what failed included."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._under_way.total(), timeout=STALL_S):
                raise _stalled("gradients")
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
        return GradientRead(self._engine.read(windows, [], into), tensors, names[0])

    # --- buffers and errors -------------------------------------------------------------------------------------------

    def _take(self, index: int) -> Slot:
        self._await(lambda: bool(self._free), self._label(index))
        slot = self._take_free()
        assert slot is not None  # one thread takes
        return slot

    def _take_free(self) -> Slot | None:
        with self._changed:
            return self._free.popleft() if self._free else None

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for something. As long as writes land, nothing is stalled.

        Raises:
            DiskError: what a write met.
        """
        with self._changed:
            while not ready() and self._error is None:
                seen = self._landings
                if not self._changed.wait_for(
                    lambda: ready() or self._error or self._landings != seen,  # noqa: B023
                    timeout=STALL_S,
                ):
                    raise _stalled(what)
            if self._error is not None:
                raise self._error

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
        return _lost(self._label(index), error) if isinstance(error, DiskError) else error

    def _label(self, index: int) -> str:
        return f"the gradient of {self._names[index]} (block {self._places[index][0].block})"

    def close(self) -> None:
        """Give the memory back. The files go with the scratch folder."""
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


def _lost(what: str, error: DiskError) -> DiskError:
    return DiskError(
        f"{what} is lost, which went through the run's scratch folder: {error}. See that nothing else fills or changes "
        "that folder, or give more host memory, which keeps gradients there"
    )


def _stalled(what: str) -> StallError:
    return StallError(f"{what}: nothing was written or read for {STALL_S:.0f} s: is the drive still there?")


def _check_whole(transfer: Transfer) -> None:
    """See that all bytes of a read that is over are there.

    Raises:
        PenstockError: they are not: it was cancelled, for one.
    """
    error = failure_of(transfer)
    if error is not None:
        raise error
