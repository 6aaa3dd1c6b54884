"""Where new weights go: into the slot of a block that stays in host memory, or through a buffer into a scratch file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ...memory.arena import PAGE, HostArena, Slot, round_up
from ...memory.disk import DiskEngine
from ...memory.image import Image, Place, whole_window
from ...memory.transfer import Transfer
from ..build import Machinery
from ..dtypes import torch_dtype
from ..layout import Layout
from .watch import Watch


class Weights(Protocol):
    """Where new weights go, block by block."""

    def names(self, block: int) -> Sequence[str]:
        """The parameters of a block."""
        ...

    def is_free(self, block: int) -> bool:
        """Whether a block may be begun now, or another one has to end before."""
        ...

    def written_nbytes(self, blocks: Collection[int]) -> int:
        """What is written to disk when these have changed."""
        ...

    def begin(self, block: int, *, whole: bool) -> Mapping[str, torch.Tensor]:
        """The weights of a block, to be written to."""
        ...

    def end(self, block: int) -> None:
        """All that was to be written to it has been."""
        ...

    def begin_lent(self, block: int, slot: Slot) -> Mapping[str, torch.Tensor]:
        """The weights of a block that is lent, in that slot of what computes, to be written to."""
        ...

    def end_lent(self, block: int, slot: Slot, changed: Sequence[tuple[str, int, int]]) -> None:
        """These elements of its parameters have been."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


class TrainedWeights:
    """The weights of a streamed model, in the dtype that computes, while they change.

    A block that does not stay in host memory is read from where its weights came from until it changes first; from then
    on from a scratch file, where its slot lies as it is.

    Args:
        machinery: What runs the model. Its images are changed.
        paths: Scratch files, one per drive; blocks take turns.
        watch: For waits.
    """

    def __init__(self, machinery: Machinery, paths: Sequence[str], watch: Watch) -> None:
        self._watch = watch
        self._images = machinery.images
        self._engine: DiskEngine = machinery.engine
        self._host = machinery.host
        self._device = machinery.device
        home = machinery.front if machinery.back is None else machinery.back
        self._slots = dict(home.permanent)
        self._portions = {b.id: [portion.name for portion in b.portions] for b in machinery.layout.blocks}
        moving = [image.nbytes for block, image in self._images.items() if block not in self._slots]
        self._staging = machinery.device.host_arena(max(moving, default=1))
        self._paths = paths
        self._ends = [0] * len(paths)
        self._scratch: dict[int, tuple[str, int]] = {}
        self._open: int | None = None
        self._under_way: Transfer | None = None
        """What was last read into the buffer, or written from it."""
        on_device = {} if machinery.back is None else machinery.front.permanent
        self._lent = {0: on_device[0]} if on_device else {}
        """Slots on a device apart of blocks that are lent for good: nobody asks for them again."""
        self._device_images = {b.id: b.device_image for b in machinery.layout.blocks}

    @staticmethod
    def needed_nbytes(layout: Layout) -> int:
        """Host memory that it would take."""
        home = layout.front if layout.back is None else layout.back
        return max((block.image.nbytes for block in layout.blocks if block.id not in home.resident), default=0)

    def names(self, block: int) -> Sequence[str]:
        """The parameters of a block."""
        return self._portions[block]

    def is_free(self, block: int) -> bool:
        """There is one buffer for those that do not stay."""
        return block in self._slots or self._open is None

    def written_nbytes(self, blocks: Collection[int]) -> int:
        """What is written to disk when these have changed."""
        return sum(round_up(self._images[block].nbytes) for block in blocks if block not in self._slots)

    def begin(self, block: int, *, whole: bool) -> Mapping[str, torch.Tensor]:
        """The weights of a block, to be written to: flat, as they lie in memory, by the parameter's name.

        Args:
            block: Nobody else has it; see `is_free`.
            whole: Whether all of them will be written; else those that are not keep their values.

        Raises:
            DiskError: the present ones cannot be read.
        """
        image = self._images[block]
        slot = self._slots.get(block)
        if slot is not None:
            raw = self._host.view(slot.offset, slot.nbytes)
        else:
            assert self._open is None, f"block {self._open} is not finished"
            raw = self._staging.view(0, image.nbytes)
            if not whole:
                read = self._engine.read(image.windows, image.bounces, raw, urgent=True)
                self._wait(read, f"the weights of block {block} are being read")
            self._open = block
        return {name: _flat(raw, image.places[name]) for name in self._portions[block]}

    def end(self, block: int) -> None:
        """All that was to be written to it has been: from now on this is what is read.

        Raises:
            DiskError: it cannot be written.
        """
        slot = self._slots.get(block)
        if slot is not None:
            self._refresh(block, self._host, slot.offset)
            return
        assert self._open == block, f"block {block} was not begun"
        image = self._images[block]
        nbytes = round_up(image.nbytes)
        path, offset = self._place(block)
        written = self._engine.write(path, offset, self._staging.view(0, nbytes))
        self._wait(written, f"the weights of block {block} are being written to {path}")
        self._images[block] = _as_it_lies(image, path, offset)
        self._refresh(block, self._staging, 0)
        self._open = None

    # --- blocks that change while they are lent -----------------------------------------------------------------------

    def changes_lent(self, block: int) -> bool:
        """Whether a block may: in the memory that it is lent from, or where the host's copy of it stays."""
        return block in self._slots or not self._device.separate

    def moving_nbytes(self, block: int) -> int:
        """What a block takes on disk; 0 where it stays in memory."""
        return 0 if block in self._slots else round_up(self._images[block].nbytes)

    def begin_lent(self, block: int, slot: Slot) -> Mapping[str, torch.Tensor]:
        """The weights of a block that is lent: flat, as they lie in memory, by the parameter's name.

        Args:
            block: See `changes_lent`.
            slot: Where it is lent from. It stays there until `end_lent`.
        """
        image, home = self._images[block], self._slots.get(block, slot)
        raw = self._host.view(home.offset, image.nbytes)
        return {name: _flat(raw, image.places[name]) for name in self._portions[block]}

    def end_lent(self, block: int, slot: Slot, changed: Sequence[tuple[str, int, int]]) -> None:
        """These elements have been written to: parameter, first, end.

        Raises:
            DiskError: they cannot be written.
        """
        home = self._slots.get(block)
        if home is None:
            self._write_lent(block, slot, changed)
        elif self._device.separate:
            self._copy_to(block, self._host, home.offset, slot)

    def _write_lent(self, block: int, slot: Slot, changed: Sequence[tuple[str, int, int]]) -> None:
        image = self._images[block]
        known = block in self._scratch
        path, offset = self._place(block)
        spans = [(0, round_up(image.nbytes))]
        if known:
            spans = _pages([_bytes_of(image.places[name], start, stop) for name, start, stop in changed])
        for start, stop in spans:
            written = self._engine.write(path, offset + start, self._host.view(slot.offset + start, stop - start))
            self._wait(written, f"weights of block {block} are being written to {path}")
        self._images[block] = _as_it_lies(image, path, offset)

    def _place(self, block: int) -> tuple[str, int]:
        """Where a block lies in a scratch file."""
        if block not in self._scratch:
            drive = len(self._scratch) % len(self._paths)
            self._scratch[block] = (self._paths[drive], self._ends[drive])
            self._ends[drive] += round_up(self._images[block].nbytes)
        return self._scratch[block]

    def _wait(self, transfer: Transfer, what: str) -> None:
        self._under_way = transfer
        self._watch.transfer(transfer, lambda: what)

    def _refresh(self, block: int, source: HostArena, start: int) -> None:
        """Copy a block that is lent for good to where it is lent. What computed with it must have been enqueued."""
        slot = self._lent.get(block)
        if slot is not None:
            self._copy_to(block, source, start, slot)

    def _copy_to(self, block: int, source: HostArena, start: int, slot: Slot) -> None:
        """Copy a block to a slot on a device apart."""
        image = self._device_images[block]
        assert image is not None, block
        self._device.copies_wait(self._device.computed())
        for first, offset, nbytes in image.parts(0, self._images[block].nbytes):
            self._device.copy(source, start + first, slot.arena, slot.offset + offset, nbytes)
        copied = self._device.copied()
        self._device.compute_waits(copied)
        self._device.wait(copied)  # the source may be written to again

    def close(self) -> None:
        """Give the buffer back, unless a drive that hangs may still write into it."""
        if self._under_way is None or self._under_way.done():
            self._staging.close()


def _flat(raw: memoryview, place: Place) -> torch.Tensor:
    dtype = torch_dtype(place.dtype)
    return torch.frombuffer(raw, dtype=dtype, count=place.nbytes // dtype.itemsize, offset=place.offset)


def _bytes_of(place: Place, start: int, stop: int) -> tuple[int, int]:
    """Where elements of a parameter lie in the image."""
    itemsize = torch_dtype(place.dtype).itemsize
    return place.offset + start * itemsize, place.offset + stop * itemsize


def _pages(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Whole pages that hold these spans, none twice."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((start // PAGE * PAGE, round_up(stop)) for start, stop in spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def _as_it_lies(image: Image, path: str, offset: int) -> Image:
    """The image of a slot that was written to a file byte for byte."""
    return replace(image, windows=(whole_window(path, offset, image.nbytes),), bounces=())
