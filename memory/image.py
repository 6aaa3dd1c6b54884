"""How a block's tensors lie in a slot, and which reads put them there.

Files are read with O_DIRECT, which moves whole aligned windows only. A tensor's bytes start anywhere in a file, so a
window is read to the slot as it is and the tensor becomes a view at the window's start plus the skew ("in place": no
copy by the CPU). Tensors that change dtype, that are assembled from several spans, or that are tiny go through a small
staging buffer instead ("bounce").

Some CPU kernels sum in another order when an operand starts off a 64-byte boundary (seen: float32 matrix–vector
products, by the address modulo 16). A resident model has its weights where the file puts them, because safetensors
maps files; so a tensor that is stored as it is used keeps its file offset modulo 64 here too, and one that is converted
starts on a boundary, as a freshly allocated one would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

from .arena import PAGE, round_up
from .layout import ITEMSIZE, TensorSource

ALIGN: Final = 64
"""Modulus of a tensor's address that results may depend on; torch's own CPU allocator aligns to it."""
SMALL: Final = 16 * 1024
"""Tensors below this are bounced: a window of their own would cost more than the copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """One in-place read: an aligned piece of a file to the same alignment in the slot."""

    path: str
    file_offset: int
    """Start in the file, a multiple of the page."""
    nbytes: int
    """Length, a multiple of the page; may reach past the end of the file."""
    needed_nbytes: int
    """Bytes from the start that must exist in the file."""
    offset: int
    """Start in the slot, a multiple of the page."""
    data_offset: int
    """Where the wanted bytes start in the slot when the read is complete."""
    final_offset: int
    """Where they must start; differs from `data_offset` when they must be aligned otherwise than in the file."""
    data_nbytes: int
    skew: int
    """Bytes after a 64-byte boundary at which kernels are to find the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounce:
    """One read through staging: any bytes of a file to any place in the slot, changing dtype on the way."""

    path: str
    file_offset: int
    nbytes: int
    """Bytes in the file."""
    offset: int
    """Where the result starts in the slot."""
    source_dtype: str
    target_dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one tensor lies in a slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the slot."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A block as it lies in a host slot, and the reads that fill it."""

    nbytes: int
    """Size of the slot it needs, a multiple of the page."""
    places: dict[str, Place]
    windows: tuple[Window, ...]
    bounces: tuple[Bounce, ...]

    @property
    def read_nbytes(self) -> int:
        """Bytes that one fill reads from disk, rounding included."""
        return sum(w.nbytes for w in self.windows) + sum(bounce_window(b) for b in self.bounces)

    @property
    def data_nbytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(place.nbytes for place in self.places.values())


STAGING: Final = 2**20
"""Most bytes that one bounce moves at a time; a longer one is cut."""


def bounce_window(bounce: Bounce) -> int:
    """Bytes that a bounce reads, each of its cuts rounded to the page at both ends."""
    total = 0
    for at in range(0, bounce.nbytes, STAGING):
        start = bounce.file_offset + at
        total += round_up(start + min(STAGING, bounce.nbytes - at)) - start // PAGE * PAGE
    return total


def build_image(tensors: Iterable[tuple[str, TensorSource, str]], *, move: bool = True) -> Image:
    """Lay `(name, source, target dtype)` out in a slot.

    With `move`, runs are moved inside the slot after they have been read, where kernels expect another alignment than
    the file has; without (the slot is only copied from), they are left where they are.
    """
    items = list(tensors)
    direct = sorted((item for item in items if _in_place(*item[1:])), key=lambda i: _key(i[1]))
    places: dict[str, Place] = {}
    windows: list[Window] = []
    at = 0
    for run in _runs(direct):
        first, last = run[0][1].spans[0], run[-1][1].spans[0]
        start = first.offset // PAGE * PAGE
        end = last.offset + last.nbytes
        data = at + first.offset - start
        skew = source_skew(run[0][1], run[0][2])
        window = Window(
            path=first.path,
            file_offset=start,
            nbytes=round_up(end - start),
            needed_nbytes=end - start,
            offset=at,
            data_offset=data,
            final_offset=_moved(data, at, skew) if move else data,
            data_nbytes=end - first.offset,
            skew=skew,
        )
        windows.append(window)
        for name, source, dtype in run:
            offset = window.final_offset + source.spans[0].offset - first.offset
            places[name] = Place(offset=offset, shape=source.shape, dtype=dtype)
        at += window.nbytes + (PAGE if window.final_offset > window.data_offset else 0)
    bounces: list[Bounce] = []
    for name, source, dtype in items:
        if name in places:
            continue
        at = round_up(at, ALIGN) + source_skew(source, dtype)
        place = Place(offset=at, shape=source.shape, dtype=dtype)
        places[name] = place
        bounces.extend(bounces_of(source, dtype, place.offset))
        at += place.nbytes
    return Image(nbytes=max(round_up(at), PAGE), places=places, windows=tuple(windows), bounces=tuple(bounces))


def _moved(data: int, floor: int, skew: int) -> int:
    """The nearest offset with the given skew, below `data` if there is room above `floor`."""
    down = data - (data - skew) % ALIGN
    return down if down >= floor else down + ALIGN


def source_skew(source: TensorSource, dtype: str) -> int:
    """How far after a 64-byte boundary a resident model would have this tensor."""
    if source.skew is not None:
        return source.skew
    if source.dtype != dtype or len(source.spans) != 1 or source.spans[0].offset % ITEMSIZE[dtype]:
        return 0
    return source.spans[0].offset % ALIGN


def _in_place(source: TensorSource, dtype: str) -> bool:
    return source.dtype == dtype and len(source.spans) == 1 and source.nbytes >= SMALL


def _key(source: TensorSource) -> tuple[str, int]:
    return source.spans[0].path, source.spans[0].offset


def _runs(items: list[tuple[str, TensorSource, str]]) -> list[list[tuple[str, TensorSource, str]]]:
    """Group tensors that follow each other in a file and want the alignment that this gives them, for one window."""
    runs: list[list[tuple[str, TensorSource, str]]] = []
    for item in items:
        span = item[1].spans[0]
        if runs:
            start, before = runs[-1][0][1].spans[0], runs[-1][-1][1].spans[0]
            adjacent = before.path == span.path and before.offset + before.nbytes == span.offset
            natural = (source_skew(*runs[-1][0][1:]) + span.offset - start.offset) % ALIGN
            if adjacent and natural == source_skew(*item[1:]):
                runs[-1].append(item)
                continue
        runs.append([item])
    return runs


def bounces_of(source: TensorSource, dtype: str, offset: int = 0) -> list[Bounce]:
    """The reads that put a tensor's bytes at `offset` as `dtype`, one after another."""
    bounces = []
    element, result = ITEMSIZE[source.dtype], ITEMSIZE[dtype]
    for span in source.spans:
        assert span.nbytes % element == 0, "a span cuts an element"
        bounces.append(
            Bounce(
                path=span.path,
                file_offset=span.offset,
                nbytes=span.nbytes,
                offset=offset,
                source_dtype=source.dtype,
                target_dtype=dtype,
            )
        )
        offset += span.nbytes // element * result
    return bounces


def whole_window(path: str, file_offset: int, nbytes: int) -> Window:
    """A window of bytes that are wanted as they are, to the start of a slot. All values multiples of the page."""
    return Window(
        path=path,
        file_offset=file_offset,
        nbytes=nbytes,
        needed_nbytes=nbytes,
        offset=0,
        data_offset=0,
        final_offset=0,
        data_nbytes=nbytes,
        skew=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of a host image and where it goes in the device image."""

    start: int
    stop: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceImage:
    """A block as it lies in a device slot: the host image without the skews."""

    nbytes: int
    places: dict[str, Place]
    segments: tuple[Segment, ...]

    def parts(self, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """The copies `(host offset, device offset, nbytes)` that move a valid range of the host image."""
        for segment in self.segments:
            first, last = max(start, segment.start), min(stop, segment.stop)
            if first < last:
                yield first, segment.target + first - segment.start, last - first


DEVICE_ALIGN: Final = 256
"""Alignment of runs in device memory, that of CUDA's own allocator."""


def device_image(image: Image, *, keep_skew: bool) -> DeviceImage:
    """The device layout of a host image built without moves.

    With `keep_skew` tensors are aligned as kernels expect them on the CPU (a device that computes with its kernels);
    without, runs start on a boundary.
    """
    assert all(w.final_offset == w.data_offset for w in image.windows), "the host image moves what is being copied"
    spans = [(w.data_offset, w.data_offset + w.data_nbytes, w.skew) for w in image.windows]
    if image.bounces:
        first = min(b.offset for b in image.bounces) // ALIGN * ALIGN
        spans.append((first, image.nbytes, 0))
    segments: list[Segment] = []
    places: dict[str, Place] = {}
    at = 0
    for start, stop, skew in spans:
        at = round_up(at, DEVICE_ALIGN) + (skew if keep_skew else 0)
        segments.append(Segment(start=start, stop=stop, target=at))
        at += stop - start
    for name, place in image.places.items():
        home = next((s for s in segments if s.start <= place.offset < s.stop), None)
        if home is None:  # a tensor without bytes
            places[name] = Place(offset=0, shape=place.shape, dtype=place.dtype)
            continue
        offset = home.target + place.offset - home.start
        places[name] = Place(offset=offset, shape=place.shape, dtype=place.dtype)
    return DeviceImage(nbytes=max(round_up(at), PAGE), places=places, segments=tuple(segments))


def packed_image(tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> Image:
    """The image of a block that we write ourselves: one window, to be given its file and offset when it is written.

    Args:
        tensors: `(name, shape, dtype, skew)`; a tensor starts `skew` bytes after a 64-byte boundary.
    """
    places: dict[str, Place] = {}
    at = 0
    for name, shape, dtype, skew in tensors:
        at = round_up(at, ALIGN) + skew
        places[name] = Place(offset=at, shape=shape, dtype=dtype)
        at += places[name].nbytes
    nbytes = max(round_up(at), PAGE)
    window = whole_window("", 0, nbytes)
    return Image(nbytes=nbytes, places=places, windows=(window,), bounces=())
