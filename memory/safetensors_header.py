"""The header of one safetensors file, read with plain file reads and believed only after it has been checked.

The format: 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes. Every byte after the header
belongs to exactly one tensor: overlaps, holes and trailing bytes are errors.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from .errors import CheckpointError
from .layout import ITEMSIZE, FileSpan, TensorSource

MAX_HEADER_NBYTES: Final = 100_000_000
"""The cap that the format itself sets; no honest header comes near it."""

MAX_DIMS: Final = 64
"""More dimensions than any tensor library takes."""

MAX_DIM: Final = 2**63 - 1

_PREFIX_NBYTES: Final = 8
_PIECE_NBYTES: Final = 4 * 2**20
_AGAIN: Final = "download or save the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What one file holds."""

    tensors: Mapping[str, TensorSource]
    """Each with one span (none where the tensor has no elements), in the order of the file."""
    metadata: Mapping[str, str]
    file_nbytes: int


class _DuplicateKeyError(ValueError):
    """A JSON object names a key twice: which of the two holds would depend on the reader."""


def parse_json(text: bytes) -> Any:
    """The value in `text`, refusing duplicate keys; raises ValueError on anything that is not JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _DuplicateKeyError(f"the key {twice!r} occurs twice")
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_regular_file(path: str, *, nbytes: int, max_nbytes: int | None = None) -> tuple[bytes, int]:
    """The first `nbytes` bytes of a file (fewer where it ends before), and the size of the whole file in bytes.

    Links are followed and must end at a regular file: a fifo or a device is refused before it is opened. Raises
    CheckpointError on that, on any I/O error, and where the file is larger than `max_nbytes`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(
                f"{path}: not a regular file; a checkpoint holds only regular files and links to them"
            )
        # O_NONBLOCK: should the file have been swapped for a fifo since, opening it must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: changed while it was opened; try again")
            if max_nbytes is not None and status.st_size > max_nbytes:
                raise CheckpointError(
                    f"{path}: {status.st_size} bytes, at most {max_nbytes} are sensible; the file is damaged: {_AGAIN}"
                )
            return file.read(min(nbytes, status.st_size)), status.st_size
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def read_header(path: str) -> Header:
    """Read and check the header of the safetensors file at `path`; no tensor is read.

    Raises CheckpointError, naming file, tensor and remedy, where anything in it cannot be true.
    """
    prefix, file_nbytes = read_regular_file(path, nbytes=_PREFIX_NBYTES)
    if len(prefix) < _PREFIX_NBYTES:
        raise CheckpointError(f"{path}: {file_nbytes} bytes, too short for a safetensors file; {_AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{path}: states a header of {length} bytes, the format allows {MAX_HEADER_NBYTES}; "
            f"this is not a safetensors file or it is damaged: {_AGAIN}"
        )
    start = _PREFIX_NBYTES + length
    if start > file_nbytes:
        raise CheckpointError(
            f"{path}: states a header of {length} bytes, the file has {file_nbytes}; it is truncated: {_AGAIN}"
        )
    text, _ = read_regular_file(path, nbytes=start)
    try:
        entries = parse_json(text[_PREFIX_NBYTES:])
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a {type(entries).__name__}, not a JSON object; {_AGAIN}")
    metadata = _check_metadata(path, entries.pop("__metadata__", None))
    tensors = _check_layout(path, entries, start=start, file_nbytes=file_nbytes)
    return Header(tensors=tensors, metadata=metadata, file_nbytes=file_nbytes)


def _check_metadata(path: str, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a map from text to text; {_AGAIN}")
    return metadata


def _is_count(value: object, limit: int) -> bool:
    # bool is an int to Python, and `true` is no size.
    return type(value) is int and 0 <= value <= limit


def _check_tensor(path: str, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, and the two offsets of one entry, after every check that needs no other entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the entry of {name!r} is not {{dtype, shape, data_offsets}}; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{path}: {name!r} has the unknown dtype {dtype!r}; known are {', '.join(ITEMSIZE)}: "
            "save the checkpoint in one of those"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(dim, MAX_DIM) for dim in shape):
        raise CheckpointError(f"{path}: {name!r} has the impossible shape {str(shape)[:80]}; {_AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(at, MAX_DIM) for at in offsets):
        raise CheckpointError(f"{path}: {name!r} has the impossible offsets {str(offsets)[:80]}; {_AGAIN}")
    begin, end = offsets
    nbytes = prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name!r} is {dtype}{shape}, which takes {nbytes} bytes, but its offsets span "
            f"{end - begin}; {_AGAIN}"
        )
    return dtype, tuple(shape), begin, end


def _check_layout(path: str, entries: dict[str, object], *, start: int, file_nbytes: int) -> dict[str, TensorSource]:
    checked = {name: _check_tensor(path, name, entry) for name, entry in entries.items()}
    tensors: dict[str, TensorSource] = {}
    data_nbytes = file_nbytes - start
    at = 0
    for name, (dtype, shape, begin, end) in sorted(checked.items(), key=lambda item: item[1][2:]):
        if end > data_nbytes:
            raise CheckpointError(
                f"{path}: {name!r} ends at byte {end} of the data, the file holds {data_nbytes}; "
                f"it is truncated or its offsets are wrong: {_AGAIN}"
            )
        if begin != at:
            what = f"overlaps the tensor before it by {at - begin}" if begin < at else f"leaves a hole of {begin - at}"
            raise CheckpointError(f"{path}: {name!r} {what} bytes, which the format forbids; {_AGAIN}")
        at = end
        span = FileSpan(path=path, offset=start + begin, nbytes=end - begin)
        tensors[name] = TensorSource(shape=shape, dtype=dtype, spans=(span,) if span.nbytes else ())
    if at != data_nbytes:
        raise CheckpointError(f"{path}: {data_nbytes - at} bytes after the last tensor belong to none; {_AGAIN}")
    return tensors


def same_bytes(one: Sequence[FileSpan], other: Sequence[FileSpan]) -> bool:
    """Whether two lists of spans hold the same bytes. Reads both, a few MiB at a time; equal lists are not read."""
    if tuple(one) == tuple(other):
        return True
    if sum(span.nbytes for span in one) != sum(span.nbytes for span in other):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(spans: Sequence[FileSpan]) -> Iterator[bytes]:
    """The bytes of the spans in pieces of one size, however the spans cut them."""
    piece = bytearray()
    for span in spans:
        done = 0
        try:
            with open(span.path, "rb", buffering=0) as file:
                file.seek(span.offset)
                while done < span.nbytes:
                    got = file.read(min(_PIECE_NBYTES - len(piece), span.nbytes - done))
                    if not got:
                        raise CheckpointError(f"{span.path}: ends before byte {span.offset + span.nbytes}; {_AGAIN}")
                    piece += got
                    done += len(got)
                    if len(piece) == _PIECE_NBYTES:
                        yield bytes(piece)
                        piece.clear()
        except OSError as error:
            raise CheckpointError(f"{span.path}: cannot be read ({error.strerror}); check the disk") from error
    if piece:
        yield bytes(piece)
