"""Something about each token, or block, of a sequence, which becomes longer and sometimes shorter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .policy import FloatArray, Heads, IntArray, Keys


class Growing:
    """An array [heads, length, …] that is added to at its end, without being copied each time."""

    def __init__(self, heads: int, *rest: int) -> None:
        self._held: FloatArray = np.zeros((heads, 16, *rest), np.float32)
        self.length = 0

    @property
    def values(self) -> FloatArray:
        """[heads, length, …], to be read and changed in place."""
        return self._held[:, : self.length]

    def append(self, more: FloatArray) -> None:
        """Add [heads, some, …]."""
        needed = self.length + more.shape[1]
        if needed > self._held.shape[1]:
            larger = np.zeros((self._held.shape[0], 2 * needed, *self._held.shape[2:]), np.float32)
            larger[:, : self.length] = self.values
            self._held = larger
        self._held[:, self.length : needed] = more
        self.length = needed

    def crop(self, length: int) -> None:
        """Forget all after `length`."""
        self.length = min(self.length, length)


class BlockFacts:
    """Something about each full block: `fact` of its keys [kv_heads, block, dim] → [kv_heads, …].

    It is worked out when a block is full, from keys that are at hand then. Those of the block that is not full are held
    until it is; that one is always attended to.
    """

    def __init__(self, heads: Heads, block_tokens: int, fact: Callable[[FloatArray], FloatArray], *shape: int) -> None:
        self._heads = heads
        self._size = block_tokens
        self._fact = fact
        self._facts = Growing(heads.kv_heads, *shape)
        self._tail: FloatArray = np.zeros((heads.kv_heads, 0, heads.dim), np.float32)

    @property
    def values(self) -> FloatArray:
        """[kv_heads, full blocks, …]."""
        return self._facts.values

    def append(self, keys: FloatArray) -> None:
        """New keys, [kv_heads, tokens, dim]."""
        keys = np.concatenate([self._tail, keys.astype(np.float32, copy=False)], axis=1)
        full = keys.shape[1] // self._size
        for number in range(full):
            block = keys[:, number * self._size : (number + 1) * self._size]
            self._facts.append(self._fact(block)[:, None])
        self._tail = keys[:, full * self._size :].copy()

    def crop(self, tokens: int, keys: Keys) -> None:
        """Forget all after `tokens`; the keys of a block that is no longer full are read again."""
        if tokens >= self._facts.length * self._size + self._tail.shape[1]:
            return
        blocks, left = divmod(tokens, self._size)
        if blocks < self._facts.length:
            ids: IntArray = np.arange(blocks * self._size, tokens)
            rows = [keys.rows(head, ids) for head in range(self._heads.kv_heads)]
            self._tail = np.stack(rows).astype(np.float32)
            self._facts.crop(blocks)
        else:
            self._tail = self._tail[:, :left]
