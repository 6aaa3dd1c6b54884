"""Keys in an array, and how many bytes of them were read."""

from __future__ import annotations

import numpy as np

from .policies.policy import FloatArray, Heads, IntArray


class ArrayKeys:
    """Stored keys [kv_heads, tokens, dim] for policies to choose from, with a meter that counts stored bytes."""

    def __init__(self, heads: Heads, values: FloatArray) -> None:
        self._heads = heads
        self.values = values
        self.read_nbytes = 0

    def rows(self, head: int, tokens: IntArray) -> FloatArray:
        """See `Keys`."""
        self.read_nbytes += len(tokens) * self._heads.key_nbytes
        rows: FloatArray = self.values[head, tokens]
        return rows

    def channels(self, head: int, channels: IntArray, start: int, stop: int) -> FloatArray:
        """See `Keys`."""
        self.read_nbytes += (stop - start) * len(channels) * self._heads.itemsize
        return np.ascontiguousarray(self.values[head, start:stop][:, channels])
