"""What keys and values depend on, and the names of blocks that follow from it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError

KEY_NBYTES: Final = 32
_PERSON: Final = b"penstock kv 1"
"""Of the hash: what else is hashed elsewhere is never the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvIdentity:
    """Everything but tokens that keys and values depend on. Two that differ in anything share nothing."""

    weights: str
    """Fingerprint of the weights as they are computed with, quantisation included."""
    dtype: str
    """Of keys and values."""
    rope: str
    """Kind, base, scaling, of positions: all that rotates keys."""
    layout: str
    """How a block's bytes are arranged: layers, heads, head size, codec, version."""
    block_tokens: int
    adapter: str = ""
    """Fingerprint of what is added to the weights; "" for nothing."""
    salt: str = ""
    """Keeps users apart who must not learn of each other's prompts by how fast they are answered."""

    def root(self) -> bytes:
        """The key that the first block follows."""
        if self.block_tokens < 1:
            raise UsageError(f"a block has at least one token, not {self.block_tokens}")
        hashed = _hash()
        for value in (self.weights, self.dtype, self.rope, self.layout, self.adapter, self.salt):
            text = value.encode()
            hashed.update(struct.pack("<Q", len(text)) + text)  # so that no two sequences of texts look the same
        hashed.update(struct.pack("<Q", self.block_tokens))
        return hashed.digest()


def chain(identity: KvIdentity, tokens: Sequence[int], *, blocks: int | None = None) -> Iterator[bytes]:
    """Keys of the full blocks of a sequence, in order: each depends on all tokens up to its block's end.

    Args:
        identity: What else they depend on.
        tokens: Ids, from the first one on.
        blocks: How many, at most.

    Raises:
        UsageError: a token is no whole number of 64 bits, or a block has none.
    """
    size = identity.block_tokens
    key = identity.root()
    full = len(tokens) // size
    for number in range(full if blocks is None else min(full, blocks)):
        hashed = _hash()
        hashed.update(key)
        hashed.update(packed_tokens(tokens[number * size : (number + 1) * size]))
        key = hashed.digest()
        yield key


def packed_tokens(tokens: Sequence[int]) -> bytes:
    """Ids as bytes."""
    try:
        return struct.pack(f"<{len(tokens)}q", *tokens)
    except struct.error as error:
        raise UsageError(f"tokens are whole numbers of at most 64 bits: {error}") from error


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=KEY_NBYTES, person=_PERSON)
