"""SentenceKV: whole sentences, by what their mean key scores for the sentence being written (arXiv 2504.00970)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ....memory.errors import UsageError
from .base import Base
from .growing import Growing
from .keeping import everything, token_candidates
from .policy import FloatArray, Heads, IntArray, Keys, Query, Selection, Setting


class Sentences(Base):
    """The mean query of the sentence that is being written asks for sentences; the best are taken whole.

    Whoever appends tells where sentences end (`ended`), since that takes a tokenizer. A sentence of a block's length is
    cut there. The paper's code drops most of the prompt first, by SnapKV's votes; here all of it can be found.
    """

    name: ClassVar[str] = "sentencekv"
    summary: ClassVar[str] = "whole sentences, by their mean key and the mean query of the current one"

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self.longest = setting.block_tokens
        if setting.budget_tokens < setting.sinks + max(setting.recent, self.longest):
            raise UsageError(
                f"a budget of {setting.budget_tokens} tokens is less than {setting.sinks} first ones and a sentence of "
                f"up to {self.longest}: give a larger budget, or smaller blocks, of which sentences have one at most"
            )
        self._means = Growing(heads.kv_heads, heads.dim)
        self._bounds: list[int] = [0]
        """Where sentences begin; the last one is not over."""
        self._tail: FloatArray = np.zeros((heads.kv_heads, 0, heads.dim), np.float32)
        self._asked: FloatArray = np.zeros((heads.kv_heads, heads.dim), np.float32)
        self._steps = 0

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._close_full()  # of keys that came earlier, whose ends were told: a long prompt is not held whole
        self._tail = np.concatenate([self._tail, keys.astype(np.float32, copy=False)], axis=1)

    def ended(self, tokens: IntArray) -> None:
        """See `Policy`."""
        for token in tokens.tolist():
            self._close(token + 1)
            self._asked[:] = 0
            self._steps = 0

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        if tokens >= self._bounds[-1] + self._tail.shape[1]:
            return
        kept = sum(bound <= tokens for bound in self._bounds)
        if kept < len(self._bounds):
            del self._bounds[kept:]
            self._means.crop(kept - 1)
            ids: IntArray = np.arange(self._bounds[-1], tokens)
            self._tail = np.stack([keys.rows(head, ids) for head in range(self.heads.kv_heads)]).astype(np.float32)
        else:
            self._tail = self._tail[:, : tokens - self._bounds[-1]]
        self._asked[:] = 0
        self._steps = 0

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        self._asked += query.values.mean(axis=1)
        self._steps += 1
        self._close_full()
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        stop = min(among.stop, self._bounds[-1])
        room = among.room - (among.stop - stop)
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        spans = [
            (max(start, among.start), min(end, stop))
            for start, end in zip(self._bounds[:last], self._bounds[1 : last + 1], strict=True)
        ]
        means = self._means.values[:, :last]
        scores = np.einsum("hd,hsd->hs", self._asked / np.float32(self._steps), means)
        rest = np.arange(stop, query.tokens)
        ids = [np.concatenate([np.arange(among.start), _taken(row, spans, room), rest]) for row in scores]
        return Selection(ids=tuple(ids), unit_tokens=1, scored_nbytes=means.nbytes)

    def _close(self, end: int) -> None:
        """The current sentence ends before token `end`, or in several pieces, if it is long."""
        while end - self._bounds[-1] > 0:
            count = min(end - self._bounds[-1], self.longest)
            mean: FloatArray = self._tail[:, :count].mean(axis=1)
            self._means.append(mean[:, None])
            self._bounds.append(self._bounds[-1] + count)
            self._tail = self._tail[:, count:]

    def _close_full(self) -> None:
        full = self._tail.shape[1] // self.longest * self.longest
        self._close(self._bounds[-1] + full)


def _taken(scores: FloatArray, spans: list[tuple[int, int]], room: int) -> IntArray:
    """Tokens of the best sentences that fit, ascending."""
    pieces: list[IntArray] = []
    for number in np.argsort(-scores, kind="stable").tolist():
        start, stop = spans[number]
        if 0 < stop - start <= room:
            pieces.append(np.arange(start, stop))
            room -= stop - start
    return np.sort(np.concatenate([np.arange(0), *pieces]))
