"""How much of the attention a selection keeps."""

from __future__ import annotations

import numpy as np

from .policies.base import probabilities
from .policies.policy import FloatArray, Query, Selection


def attention(query: Query, keys: FloatArray) -> FloatArray:
    """What full attention gives each key: [kv_heads, rows, tokens], from all keys [kv_heads, tokens, dim]."""
    return probabilities(query, query.values @ keys[:, : query.tokens].transpose(0, 2, 1))


def recall(query: Query, keys: FloatArray, selection: Selection) -> FloatArray:
    """The part of full attention that goes to what was chosen: [kv_heads, rows], 1 where nothing is lost."""
    mass = attention(query, keys)
    kept = [mass[head][:, selection.tokens(head, query.tokens)].sum(axis=1) for head in range(len(mass))]
    return np.stack(kept)
