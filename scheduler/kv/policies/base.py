"""What most policies do about most things: nothing."""

from __future__ import annotations

import numpy as np

from .policy import FloatArray, Heads, IntArray, Keys, Query, Seen, Setting


class Base:
    """Keeps heads and setting, and overlooks what happens. A policy overrides what it looks at."""

    hears_prompts: bool = False
    hears_steps: bool = False
    for_prompts: bool = False
    reads_all_keys: bool = False

    def __init__(self, heads: Heads, setting: Setting) -> None:
        self.heads = heads
        self.setting = setting

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""

    def ended(self, tokens: IntArray) -> None:
        """See `Policy`."""

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""


def over_group(scores: FloatArray) -> FloatArray:
    """[kv_heads, rows, units] → [kv_heads, units]: a key is wanted if any head of its group wants it."""
    best: FloatArray = scores.max(axis=1)
    return best


def probabilities(query: Query, logits: FloatArray) -> FloatArray:
    """Softmax over the last axis of q·k, [kv_heads, rows, tokens], scaled by the square root of the head size."""
    scaled = logits / np.float32(np.sqrt(query.values.shape[2]))
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    normal: FloatArray = scaled / scaled.sum(axis=-1, keepdims=True)
    return normal
