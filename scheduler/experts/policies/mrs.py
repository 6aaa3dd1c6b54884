"""MRS: keep what the gate scored highest lately, chosen or not."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray

ALPHA: Final = 0.3
"""HybriMoE's released code takes 0.5."""


class Mrs:
    """HybriMoE's minus recent score (arXiv 2504.05897, eq. 3): S ← α · TopP(s) + (1 − α) · S.

    s are the gate's scores of this pass, of which only the P highest count; P is 2 · K, where a token uses K experts.
    An expert that came near but was not chosen gains too, which counts of uses do not see. Of several tokens the mean
    counts.

    Args:
        routing: The model's.
        alpha: α, above 0 and at most 1.
        top_p: P; None for 2 · K.
    """

    name: ClassVar[str] = "mrs"
    summary: ClassVar[str] = "what the gate scored highest lately, chosen or not (HybriMoE)"

    def __init__(self, routing: Routing, *, alpha: float = ALPHA, top_p: int | None = None) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}: it must be above 0 and at most 1")
        self.values: FloatArray = np.zeros((routing.layers, routing.experts))
        self.earlier: FloatArray = np.zeros(routing.experts)
        self._alpha = alpha
        self._top_p = 2 * routing.top_k if top_p is None else top_p

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        near, scores = event.candidates, event.scores
        if len(near) > self._top_p:
            highest = np.argsort(-scores, kind="stable")[: self._top_p]
            near, scores = near[highest], scores[highest]
        self.values[event.layer] *= 1 - self._alpha
        self.earlier = self.values[event.layer].copy()
        self.values[event.layer, near] += self._alpha * scores
