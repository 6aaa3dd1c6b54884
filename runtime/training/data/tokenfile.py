"""The file of tokens: all documents one behind the other, mapped into memory, so that any of them is found at once.

header   magic, where the footer lies and its checksum
tokens   the ids of all documents, 2 or 4 bytes each
loss     a byte per token, 1 where it is to be learnt; absent where that is all of them
rows     a record per document: where it ends, its tokens with loss, its row in the source
footer   JSON: what the file was made of, and where the sections lie
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ....memory.errors import DiskError
from ....memory.files import disk_error

MAGIC: Final = b"pnsttok2"
HEADER: Final = struct.Struct("<8sQQI")
"""Magic, offset and size of the footer in bytes, its crc32."""
ALIGNMENT: Final = 64
"""Sections begin at multiples of this, in bytes."""

DOCUMENT: Final = np.dtype([("end", "<i8"), ("loss", "<i8"), ("line", "<i8"), ("offset", "<i8")])
"""Tokens up to the end of the document, those of it with loss, and where its row stands in the source."""

_LARGEST_FOOTER_NBYTES: Final = 2**20
_TOGETHER_NBYTES: Final = 2**24


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenFile:
    """A file of tokens that was read and holds together.

    The arrays are views of the mapped file: they take page cache, not memory of the process.
    """

    path: Path
    made_of: Mapping[str, Any]
    """What the writer was told: source, tokenizer, options."""
    digest: str
    """Of all tokens, flags and ends: equal where the data is."""
    largest: int
    """The largest id in it; a model needs as many embeddings and one."""
    tokens: NDArray[Any]
    """[all tokens], uint16 or uint32"""
    loss: NDArray[np.uint8] | None
    """[all tokens], None where there is loss on all"""
    documents: NDArray[Any]
    """[documents] of `DOCUMENT`"""

    def __len__(self) -> int:
        return len(self.documents)

    def lengths(self) -> NDArray[np.int64]:
        """[documents], in tokens."""
        return np.diff(self.documents["end"], prepend=np.int64(0))

    def begin(self, document: int) -> int:
        """Where a document begins in `tokens`."""
        return int(self.documents["end"][document - 1]) if document else 0

    @property
    def nbytes(self) -> int:
        """Of tokens, flags and rows."""
        return self.tokens.nbytes + self.documents.nbytes + (0 if self.loss is None else self.loss.nbytes)


def read_token_file(path: Path) -> TokenFile:
    """Map a file of tokens, and read all of it once: what a run is trained on must be what it began with, bit for bit.

    Raises:
        FileNotFoundError: there is none.
        DiskError: it cannot be read, or is damaged.
    """
    try:
        return _Reader(path).read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error("read", str(path), 0, HEADER.size, error) from error
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DiskError(
            f"{path} is no file of tokens, or damaged ({error}): remove it, so that it is made again"
        ) from (error)


class _Reader:
    def __init__(self, path: Path) -> None:
        if os.stat(path).st_size < HEADER.size:
            raise ValueError(f"it has {os.stat(path).st_size} bytes")
        self._path = path
        self._mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r").view(np.ndarray)

    def read(self) -> TokenFile:
        magic, offset, nbytes, checksum = HEADER.unpack(self._mapped[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError("it begins otherwise")
        if nbytes > _LARGEST_FOOTER_NBYTES or offset + nbytes != len(self._mapped):
            raise ValueError(f"{len(self._mapped)} bytes are there and {offset + nbytes} were written")
        text = self._mapped[offset:].tobytes()
        if zlib.crc32(text) != checksum:
            raise ValueError("the checksum of its footer differs")
        footer = json.loads(text)
        if not isinstance(footer["made_of"], dict):
            raise ValueError("what it was made of is not said")
        itemsize = int(footer["itemsize"])
        tokens = self._section(footer, "tokens", np.uint16 if itemsize == 2 else np.uint32)
        loss = self._section(footer, "loss", np.uint8) if footer["flagged"] else None
        documents = self._section(footer, "rows", DOCUMENT)
        if int(documents["end"][-1] if len(documents) else 0) != len(tokens):
            raise ValueError("its documents end elsewhere than its tokens")
        if loss is not None and len(loss) != len(tokens):
            raise ValueError("it has not as many flags as tokens")
        return TokenFile(
            path=self._path,
            made_of=footer["made_of"],
            digest=str(footer["digest"]),
            largest=int(footer["largest"]),
            tokens=tokens,
            loss=loss,
            documents=documents,
        )

    def _section(self, footer: Mapping[str, Any], name: str, dtype: DTypeLike) -> NDArray[Any]:
        offset, nbytes = (int(number) for number in footer["sections"][name])
        if not 0 <= offset <= offset + nbytes <= len(self._mapped):
            raise ValueError(f"its {name} lie outside of it")
        section, found = self._mapped[offset : offset + nbytes], 0
        for start in range(0, nbytes, _TOGETHER_NBYTES):
            found = zlib.crc32(section[start : start + _TOGETHER_NBYTES].data, found)
        if found != footer["crc32"][name]:
            raise ValueError(f"the checksum of its {name}, at offset {offset}, differs")
        return section.view(dtype)
