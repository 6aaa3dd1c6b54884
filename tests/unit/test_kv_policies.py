"""What holds for all policies of selection: what is kept, budgets, crops, and how many bytes choosing read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_selections import (
    BY_BLOCK,
    CHOSEN,
    FP32,
    HEADS,
    SETTING,
    TOKENS,
    WITHIN,
    attend,
    prepared,
    some_keys,
    some_query,
    top,
)

from penstock.memory.errors import UsageError
from penstock.scheduler.kv.arraykeys import ArrayKeys
from penstock.scheduler.kv.policies import POLICIES, policy
from penstock.scheduler.kv.policies.growing import BlockFacts
from penstock.scheduler.kv.policies.keeping import best
from penstock.scheduler.kv.policies.policy import (
    Setting,
)
from penstock.scheduler.kv.recall import recall


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("tokens", [65, 72, 100, 203])
def test_sinks_and_recent_tokens_stay_and_the_budget_holds(name: str, tokens: int) -> None:
    keys = some_keys(tokens)
    made = prepared(name, keys, pieces=(20, 1, 0, 30))
    selection = made.select(some_query(tokens), ArrayKeys(HEADS, keys))
    assert len(selection.ids) == HEADS.kv_heads
    for head in range(HEADS.kv_heads):
        found = selection.tokens(head, tokens)
        assert np.all(np.diff(found) > 0)
        assert found[0] >= 0
        assert found[-1] == tokens - 1
        assert set(range(SETTING.sinks)) | set(range(tokens - SETTING.recent, tokens)) <= set(found.tolist())
        assert len(found) <= SETTING.budget_tokens
    assert selection.attended_nbytes(HEADS, tokens) <= 2 * 2 * SETTING.budget_tokens * HEADS.dim * HEADS.itemsize


@pytest.mark.parametrize("name", list(POLICIES))
def test_what_fits_is_all_attended_to_and_nothing_is_read(name: str) -> None:
    keys = some_keys(64)
    made = prepared(name, keys, pieces=(20, 1))
    stored = ArrayKeys(HEADS, keys)
    selection = made.select(some_query(64), stored)
    assert [list(selection.tokens(head, 64)) for head in range(2)] == [list(range(64))] * 2
    assert (selection.scored_nbytes, stored.read_nbytes) == (0, 0)
    assert np.allclose(recall(some_query(64), keys, selection), 1.0, atol=1e-6)


@pytest.mark.parametrize("name", CHOSEN)
def test_bytes_that_scoring_says_it_read_are_those_that_it_read(name: str) -> None:
    """Keys are metered; what a policy keeps about them is counted by its own size, and never holds all of a key."""
    keys = some_keys()
    made = prepared(name, keys)
    stored = ArrayKeys(HEADS, keys)
    selection = made.select(some_query(), stored)
    among = TOKENS - SETTING.sinks - SETTING.recent
    blocks = (TOKENS - SETTING.recent) // 8 - 1
    metered, kept = {
        "window": (0, 0),
        "random": (0, 0),
        "oracle": (2 * TOKENS * 16 * 2, 0),
        "sparq": (2 * among * 4 * 2, 0),
        "quest": (0, 2 * blocks * 2 * 16 * FP32),
        "landmark": (0, 2 * blocks * 16 * FP32),
        "h2o": (0, 2 * (TOKENS - 32) * FP32),
        "snapkv": (0, 2 * among * FP32),
        "windowkv": (0, 2 * (among // 8 * 8) * FP32),
        "sale": (0, 2 * TOKENS * (16 // 2 + FP32)),
        "sentencekv": (0, 2 * 35 * 16 * FP32),  # of 8 and 3 tokens, since none is longer than a block
        "vq": (0, 0),  # not coded yet: see below
        "alisa": (0, 2 * (TOKENS - 32) * FP32),
    }[name]
    assert stored.read_nbytes == metered
    assert selection.scored_nbytes == metered + kept


@pytest.mark.parametrize("name", CHOSEN)
def test_a_crop_leaves_what_a_shorter_sequence_would_have(name: str) -> None:
    keys, cut = some_keys(), 133
    made = prepared(name, keys)
    made.cropped(cut, ArrayKeys(HEADS, keys))
    other = some_keys(seed=9)[:, cut:]
    joined = np.concatenate([keys[:, :cut], other], axis=1)
    made.appended(other)
    fresh = policy(name, HEADS, SETTING, layer=5)
    fresh.appended(joined)
    for one in (made, fresh):
        attend(one, joined, TOKENS, seed=7)
    made.ended(np.arange(cut, TOKENS)[np.arange(cut, TOKENS) % 11 == 10])
    fresh.ended(np.arange(TOKENS)[np.arange(TOKENS) % 11 == 10])
    if name in ("random", "h2o", "alisa"):
        return  # draws go on; what was attended to before is remembered
    expected = fresh.select(some_query(), ArrayKeys(HEADS, joined))
    found = made.select(some_query(), ArrayKeys(HEADS, joined))
    assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in expected.ids]


@pytest.mark.parametrize("name", WITHIN)
def test_the_oracle_keeps_most(name: str) -> None:
    keys, query = some_keys(), some_query()
    query = replace(query, values=query.values[:, :1])  # of one head per group the oracle's choice is the best
    of = {}
    for one in (name, "oracle"):
        selection = prepared(one, keys).select(query, ArrayKeys(HEADS, keys))
        of[one] = recall(query, keys, selection)
    assert np.all(of[name] <= of["oracle"] + 1e-5)
    assert np.all(of[name] > 0)


def test_first_layers_attend_to_all() -> None:
    assert policy("window", HEADS, SETTING, layer=1).name == "exact"
    assert policy("window", HEADS, SETTING, layer=2).name == "window"
    assert policy("window", HEADS, SETTING, layer=0, dense_layers=0).name == "window"
    with pytest.raises(UsageError, match="use exact, window"):
        policy("best", HEADS, SETTING, layer=0)


def test_budgets_that_hold_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="less than the 4 first and 64 last"):
        Setting(budget_tokens=67)
    for name in BY_BLOCK:
        with pytest.raises(UsageError, match="24 of the blocks of 8 tokens"):
            policy(name, HEADS, Setting(budget_tokens=23, sinks=4, recent=8, block_tokens=8), layer=5)
        policy(name, HEADS, Setting(budget_tokens=24, sinks=4, recent=8, block_tokens=8), layer=5)


@given(scores=st.lists(st.integers(0, 5), max_size=30), count=st.integers(0, 35))
def test_the_best_are_the_largest_and_of_equal_ones_the_first(scores: list[int], count: int) -> None:
    assert best(np.array(scores, np.float32), count).tolist() == top(dict(enumerate(map(float, scores))), count)


@given(pieces=st.lists(st.integers(0, 21), min_size=1, max_size=8), cut=st.integers(0, 100), more=st.integers(0, 20))
def test_facts_of_blocks_are_those_of_their_keys(pieces: list[int], cut: int, more: int) -> None:
    """However keys come, and after a crop, which reads again no more than the block that is not full any more."""
    total = sum(pieces)
    keys = np.abs(some_keys(total + more)) + 1
    facts = BlockFacts(HEADS, 8, lambda block: block.sum(axis=1), HEADS.dim)
    at = 0
    for count in pieces:
        facts.append(keys[:, at : at + count])
        at += count
    stored = ArrayKeys(HEADS, keys)
    facts.crop(cut, stored)
    left = min(cut, total)
    assert stored.read_nbytes <= HEADS.kv_heads * (left % 8) * HEADS.key_nbytes
    facts.append(keys[:, left : left + more])
    full = (left + more) // 8
    expected = keys[:, : full * 8].reshape(HEADS.kv_heads, full, 8, HEADS.dim).sum(axis=2)
    assert np.allclose(facts.values, expected, rtol=1e-5)
