"""WindowKV: short runs of tokens, chosen together, for several layers at once (arXiv 2503.17922)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base
from .growing import Growing
from .keeping import best, everything, token_candidates
from .policy import FloatArray, Heads, IntArray, Keys, Query, Seen, Selection, Setting

RUN = 8
"""Tokens of a run."""
LAYERS = 8
"""That choose alike: the first of them chooses."""


class WindowKv(Base):
    """The last queries of a prompt vote for runs of 8 tokens; sentences survive where single tokens would be torn out.

    Layers that follow another one take its choice and read nothing. The paper also tells kinds of tasks apart, with a
    trained classifier, to weigh the budget; that is not here.
    """

    name: ClassVar[str] = "windowkv"
    summary: ClassVar[str] = "runs of 8 tokens that the end of the prompt attended to, alike in 8 layers"
    hears_prompts: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self._votes = Growing(heads.kv_heads)
        self._leader: WindowKv | None = None
        self._chosen: Selection | None = None

    def follow(self, leader: WindowKv) -> None:
        """Take the choice of a layer that runs before this one in each step."""
        self._leader = leader
        self.hears_prompts = False

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        if self._leader is None:
            self._votes.append(np.zeros(keys.shape[:2], np.float32))

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""
        if self._leader is not None or not seen.prompt:
            return
        self._votes.values[:] = 0
        for head, (tokens, mass) in enumerate(zip(seen.tokens, seen.mass, strict=True)):
            self._votes.values[head, tokens] = mass

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._votes.crop(tokens)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        if self._leader is not None:
            chosen = self._leader._chosen
            assert chosen is not None, "the layer that chooses runs first"
            return Selection(ids=chosen.ids, unit_tokens=chosen.unit_tokens, scored_nbytes=0)
        self._chosen = self._select(query.tokens)
        return self._chosen

    def _select(self, tokens: int) -> Selection:
        among = token_candidates(self.setting, tokens)
        if among is None:
            return everything(self.heads.kv_heads, tokens)
        votes = self._votes.values[:, among.start : among.stop]
        runs = votes.shape[1] // RUN
        sums = votes[:, : runs * RUN].reshape(self.heads.kv_heads, runs, RUN).sum(axis=2)
        ids = []
        for row in sums:
            first: IntArray = best(row, among.room // RUN) * RUN + among.start
            ids.append(among.with_kept((first[:, None] + np.arange(RUN)).ravel()))
        return Selection(ids=tuple(ids), unit_tokens=1, scored_nbytes=votes[:, : runs * RUN].size * votes.itemsize)
