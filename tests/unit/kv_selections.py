"""Keys, queries and policies that have seen them; and slow ways to say what is best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from penstock.scheduler.kv.policies import POLICIES, policy
from penstock.scheduler.kv.policies.policy import (
    FloatArray,
    Heads,
    Policy,
    Query,
    Seen,
    Selection,
    Setting,
)
from penstock.scheduler.kv.recall import attention

HEADS = Heads(kv_heads=2, group=3, dim=16, itemsize=2)
SETTING = Setting(budget_tokens=64, sinks=4, recent=8, block_tokens=8)
TOKENS = 203
FP32 = 4
CHOSEN = [name for name in POLICIES if name != "exact"]
WITHIN = [name for name in CHOSEN if name != "vq"]
"""Those that choose from the first token on."""
BY_BLOCK = ("quest", "landmark", "sale")


def some_keys(tokens: int = TOKENS, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((HEADS.kv_heads, tokens, HEADS.dim)).astype(np.float32)


def some_query(tokens: int = TOKENS, seed: int = 1) -> Query:
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((HEADS.kv_heads, HEADS.group, HEADS.dim)).astype(np.float32)
    return Query(values=values, tokens=tokens)


def attend(made: Policy, keys: FloatArray, tokens: int, *, seed: int = 2, prompt: bool = True) -> list[FloatArray]:
    """Show a policy what some query attended to, among all of `tokens`. Returns the mass."""
    mass = attention(some_query(tokens, seed), keys).sum(axis=1)
    rows = [np.asarray(row, np.float32) for row in mass]
    made.attended(Seen(tokens=(np.arange(tokens),) * HEADS.kv_heads, mass=tuple(rows), prompt=prompt))
    return rows


def prepared(name: str, keys: FloatArray, setting: Setting = SETTING, pieces: Sequence[int] = (50, 1, 0, 80)) -> Policy:
    """A policy that got the keys in pieces and has seen a query."""
    made = policy(name, HEADS, setting, layer=5)
    at = 0
    for count in [*pieces, keys.shape[1] - sum(pieces)]:
        made.appended(keys[:, at : at + count])
        made.ended(np.arange(at, at + count)[np.arange(at, at + count) % 11 == 10])
        at += count
    attend(made, keys, keys.shape[1])
    return made


def chosen(selection: Selection, head: int, setting: Setting = SETTING, tokens: int = TOKENS) -> list[int]:
    """Tokens that are not always kept."""
    found = [int(token) for token in selection.tokens(head, tokens)]
    return [token for token in found if setting.sinks <= token < tokens - setting.recent]


def softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    weights = [math.exp(logit - most) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def dot(a: FloatArray, b: FloatArray) -> float:
    return float(sum(float(x) * float(y) for x, y in zip(a, b, strict=True)))


def top(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda one: (-scores[one], one))[:count])


def blocks_between() -> range:
    return range(1, (TOKENS - SETTING.recent) // 8)


def by_block(scores: dict[int, float]) -> list[int]:
    room = 64 // 8 - 1 - (26 - (TOKENS - SETTING.recent) // 8)
    return top(scores, room)
