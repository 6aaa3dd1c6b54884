"""Policies of selection against slow references: which keys are chosen, and how many bytes choosing them read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.kv.arraykeys import ArrayKeys
from penstock.scheduler.kv.policies import POLICIES, policies, policy
from penstock.scheduler.kv.policies.codebook import assign, fit_codebook
from penstock.scheduler.kv.policies.growing import BlockFacts
from penstock.scheduler.kv.policies.keeping import best
from penstock.scheduler.kv.policies.policy import (
    FloatArray,
    Heads,
    IntArray,
    Policy,
    Query,
    Seen,
    Selection,
    Setting,
)
from penstock.scheduler.kv.policies.quest import upper_bounds
from penstock.scheduler.kv.policies.sale import quantised, restored
from penstock.scheduler.kv.policies.snapkv import pooled
from penstock.scheduler.kv.policies.vectors import Vectors
from penstock.scheduler.kv.recall import attention, recall

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


# --- what holds for all


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


# --- each by its own rule


def test_window() -> None:
    selection = prepared("window", some_keys()).select(some_query(), ArrayKeys(HEADS, some_keys()))
    assert [ids.tolist() for ids in selection.ids] == [[0, 1, 2, 3, *range(TOKENS - 60, TOKENS)]] * 2


def test_random_is_even_and_repeats_from_run_to_run() -> None:
    runs = []
    for _ in range(2):
        made = policy("random", HEADS, SETTING, layer=5)
        counts = np.zeros(TOKENS, int)
        for _ in range(300):
            counts[made.select(some_query(), ArrayKeys(HEADS, some_keys())).ids[0]] += 1
        runs.append(counts)
    assert np.array_equal(runs[0], runs[1])
    among = runs[0][SETTING.sinks : TOKENS - SETTING.recent]
    assert abs(among.mean() - 300 * 52 / 191) < 1e-9
    assert among.min() > 40


def test_oracle() -> None:
    keys, query = some_keys(), some_query()
    selection = prepared("oracle", keys).select(query, ArrayKeys(HEADS, keys))
    for head in range(2):
        rows = [softmax([dot(q, k) / 4.0 for k in keys[head]]) for q in query.values[head]]
        scores = {token: max(row[token] for row in rows) for token in range(4, TOKENS - 8)}
        assert chosen(selection, head) == top(scores, 52)


def blocks_between() -> range:
    return range(1, (TOKENS - SETTING.recent) // 8)


def by_block(scores: dict[int, float]) -> list[int]:
    room = 64 // 8 - 1 - (26 - (TOKENS - SETTING.recent) // 8)
    return top(scores, room)


def test_quest() -> None:
    keys, query = some_keys(), some_query()
    selection = prepared("quest", keys).select(query, ArrayKeys(HEADS, keys))
    for head in range(2):
        scores = {}
        for block in blocks_between():
            part = keys[head, block * 8 : block * 8 + 8]
            scores[block] = max(
                sum(
                    max(float(q[d]) * float(part[:, d].min()), float(q[d]) * float(part[:, d].max()))
                    for d in range(HEADS.dim)
                )
                for q in query.values[head]
            )
        found = [int(block) for block in selection.ids[head] if block in blocks_between()]
        assert found == by_block(scores)
    assert selection.unit_tokens == 8


@given(seed=st.integers(0, 10_000))
def test_quest_bounds_every_key(seed: int) -> None:
    draw = np.random.default_rng(seed)
    keys = draw.standard_normal((1, 8, 4)).astype(np.float32)
    query = draw.standard_normal((1, 2, 4)).astype(np.float32)
    ranges = np.stack([keys.min(axis=1), keys.max(axis=1)], axis=1)[:, None]
    bound = upper_bounds(query, ranges)[0, :, 0]
    assert np.all(query[0] @ keys[0].T <= bound[:, None] + 1e-5)


def test_landmark() -> None:
    keys, query = some_keys(), some_query()
    selection = prepared("landmark", keys).select(query, ArrayKeys(HEADS, keys))
    for head in range(2):
        means = {block: keys[head, block * 8 : block * 8 + 8].mean(axis=0) for block in blocks_between()}
        rows = [softmax([dot(q, mean) / 4.0 for mean in means.values()]) for q in query.values[head]]
        scores = {block: max(row[at] for row in rows) for at, block in enumerate(means)}
        found = [int(block) for block in selection.ids[head] if block in blocks_between()]
        assert found == by_block(scores)


def test_h2o_adds_up_what_it_saw() -> None:
    keys = some_keys()
    made = prepared("h2o", keys)
    total = [attend(made, keys, TOKENS, seed=seed, prompt=False) for seed in (2, 3)]  # 2 was seen before
    partly: IntArray = np.array([5, 60, 150])
    made.attended(Seen(tokens=(partly,) * 2, mass=(np.array([0.5, 9.0, 0.25], np.float32),) * 2))
    selection = made.select(some_query(), ArrayKeys(HEADS, keys))
    for head in range(2):
        scores = {token: float(2 * total[0][head][token] + total[1][head][token]) for token in range(4, TOKENS - 28)}
        for token, mass in zip(partly.tolist(), (0.5, 9.0, 0.25), strict=True):
            scores[token] += mass
        expected = [*range(4), *top(scores, 32), *range(TOKENS - 28, TOKENS)]
        assert selection.ids[head].tolist() == expected
        assert 60 in selection.ids[head]


def test_snapkv_votes_once_per_prompt_and_recalls() -> None:
    keys = some_keys()
    made = prepared("snapkv", keys)
    first = made.select(some_query(), ArrayKeys(HEADS, keys))
    mass = attention(some_query(TOKENS, 2), keys).sum(axis=1)
    for head in range(2):
        votes = {
            token: max(float(mass[head, near]) for near in range(max(0, token - 3), min(TOKENS, token + 4)))
            for token in range(4, TOKENS - 8)
        }
        assert chosen(first, head) == top(votes, 52)
    attend(made, keys, TOKENS, seed=50, prompt=False)  # decoding changes nothing
    same = made.select(some_query(seed=60), ArrayKeys(HEADS, keys))
    assert [ids.tolist() for ids in same.ids] == [ids.tolist() for ids in first.ids]
    attend(made, keys, TOKENS, seed=70)  # a second prompt finds what the first had left out
    second = made.select(some_query(), ArrayKeys(HEADS, keys))
    assert set(second.ids[0].tolist()) - set(first.ids[0].tolist())


def test_pooling_is_over_neighbours() -> None:
    assert pooled(np.array([[0, 0, 5, 0, 0, 1]], np.float32), 3).tolist() == [[0, 5, 5, 5, 1, 1]]


def test_windowkv_takes_runs_and_layers_follow() -> None:
    keys = some_keys()
    made = policies("windowkv", HEADS, SETTING, layers=12)
    assert [one.name for one in made] == ["exact"] * 2 + ["windowkv"] * 10
    for one in made:
        one.appended(keys)
        attend(one, keys, TOKENS)
    chosen_by = [one.select(some_query(), ArrayKeys(HEADS, keys)) for one in made]
    mass = attention(some_query(TOKENS, 2), keys).sum(axis=1)
    for head in range(2):
        sums = {start: float(sum(mass[head, start : start + 8])) for start in range(4, TOKENS - 8 - 7, 8)}
        runs = top(sums, 52 // 8)
        assert chosen(chosen_by[2], head) == [token for start in runs for token in range(start, start + 8)]
    scored = 2 * (191 // 8 * 8) * FP32
    assert [one.scored_nbytes for one in chosen_by] == [0, 0, scored, *[0] * 7, scored, 0]
    assert all(one.ids is chosen_by[2].ids for one in chosen_by[2:10])


def test_alisa_forgets() -> None:
    keys = some_keys()
    made = policy("alisa", HEADS, SETTING, layer=5)
    made.appended(keys)
    steps = [attend(made, keys, TOKENS, seed=seed, prompt=False) for seed in range(50)]
    selection = made.select(some_query(), ArrayKeys(HEADS, keys))
    for head in range(2):
        sums = {token: float(sum(step[head][token] for step in steps[-32:])) for token in range(4, TOKENS - 28)}
        assert selection.ids[head].tolist() == [*range(4), *top(sums, 32), *range(TOKENS - 28, TOKENS)]
    made.cropped(100, ArrayKeys(HEADS, keys))
    for _ in range(40):  # what was attended to behind the crop is forgotten as well
        made.attended(Seen(tokens=(np.arange(0),) * 2, mass=(np.zeros(0, np.float32),) * 2))
    made.appended(keys[:, 100:])
    made.attended(Seen(tokens=(np.array([50]),) * 2, mass=(np.array([1.0], np.float32),) * 2))
    assert 50 in made.select(some_query(), ArrayKeys(HEADS, keys)).ids[0]


def test_sentences_are_taken_whole() -> None:
    keys, setting = some_keys(), replace(SETTING, block_tokens=16)
    ends = [9, 15, 40, 61, 70, 75, 90, 100, 130, 144, 160, 171, 180, 188, 199]
    bounds = [0]
    for end in ends:
        while end + 1 - bounds[-1] > 16:
            bounds.append(bounds[-1] + 16)
        bounds.append(end + 1)
    made = policy("sentencekv", HEADS, setting, layer=5)
    for start, stop in ((0, 100), (100, 101), (101, TOKENS)):
        made.appended(keys[:, start:stop])
        made.ended(np.array([end for end in ends if start <= end < stop]))
    queries = [some_query(seed=seed) for seed in (1, 2)]
    for query in queries:  # two tokens of the current sentence
        selection = made.select(query, ArrayKeys(HEADS, keys))
    for head in range(2):
        asked = np.mean([query.values[head].mean(axis=0) for query in queries], axis=0)
        scores = {}
        for start, stop in pairwise(bounds):
            if start < TOKENS - 8:
                scores[start, stop] = dot(asked, keys[head, start:stop].mean(axis=0))
        room, expected = 52, []
        for start, stop in sorted(scores, key=lambda one: (-scores[one], one)):
            tokens = list(range(max(start, 4), min(stop, TOKENS - 8)))
            if tokens and len(tokens) <= room:
                expected += tokens
                room -= len(tokens)
        assert chosen(selection, head, setting) == sorted(expected)
    made.ended(np.array([TOKENS - 1]))  # the next sentence asks for itself
    third = made.select(some_query(seed=3), ArrayKeys(HEADS, keys))
    fresh = policy("sentencekv", HEADS, setting, layer=5)
    fresh.appended(keys)
    fresh.ended(np.array([*ends, TOKENS - 1]))
    alone = fresh.select(some_query(seed=3), ArrayKeys(HEADS, keys))
    assert [ids.tolist() for ids in third.ids] == [ids.tolist() for ids in alone.ids]


def test_sentences_that_never_end_are_cut() -> None:
    keys = some_keys()
    made = policy("sentencekv", HEADS, SETTING, layer=5)
    made.appended(keys)
    selection = made.select(some_query(), ArrayKeys(HEADS, keys))
    assert all(len(selection.tokens(head, TOKENS)) <= 64 for head in range(2))
    assert (
        selection.scored_nbytes == 2 * 25 * 16 * FP32
    )  # 200 of 203 tokens; of which 24 pieces begin before the last 8
    with pytest.raises(UsageError, match="a sentence of up to 64"):
        policy("sentencekv", HEADS, replace(SETTING, block_tokens=64), layer=5)


def test_codewords_score_for_their_keys() -> None:
    draw = np.random.default_rng(8)
    centres = draw.standard_normal((2, 40, HEADS.dim)) * 3
    keys = np.stack([centres[head][draw.integers(0, 40, 2000)] for head in range(2)]).astype(np.float32)
    keys += 0.05 * draw.standard_normal(keys.shape).astype(np.float32)
    made = policy("vq", HEADS, SETTING, layer=5)
    made.appended(keys[:, :900])
    assert len(made.select(some_query(900), ArrayKeys(HEADS, keys)).ids[0]) == 900  # too few keys to learn from
    made.appended(keys[:, 900:])
    stored = ArrayKeys(HEADS, keys)
    selection = made.select(some_query(2000), stored)
    assert stored.read_nbytes == 0
    assert selection.scored_nbytes == 2 * (2000 - 12) + 2 * 256 * HEADS.dim * FP32
    query = some_query(2000)
    for head in range(2):
        scores = {t: max(dot(q, keys[head, t]) for q in query.values[head]) for t in range(4, 1992)}
        exact = top(scores, 52)
        found = chosen(selection, head, tokens=2000)
        assert len(found) == 52
        assert min(scores[t] for t in found) > sorted(scores.values())[-52] - 1.0
        assert len(set(found) & set(exact)) > 20


def test_a_codebook_for_queries_keeps_what_they_ask_for() -> None:
    draw = np.random.default_rng(5)
    keys = draw.standard_normal((1500, 8)).astype(np.float32)
    queries = (draw.standard_normal((400, 8)) * np.array([5, 5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])).astype(np.float32)
    plain = fit_codebook(keys, 32)
    aware = fit_codebook(keys, 32, queries=queries)

    def error(book: FloatArray, codes: IntArray) -> float:
        return float(((queries @ (keys - book[codes]).T) ** 2).mean())

    codes = assign(keys, aware, queries=queries)
    assert error(aware, codes) < 0.2 * error(plain, assign(keys, plain))
    weights = queries.T.astype(np.float64) @ queries / len(queries)
    weights += np.eye(8) * np.trace(weights) / 8 * 1e-3
    for key, code in zip(keys[:50], codes, strict=False):
        slow = [float((key - word) @ weights @ (key - word)) for word in aware]
        assert slow[code] <= min(slow) * (1 + 1e-3) + 1e-6
    made = policy("vq", HEADS, SETTING, layer=5)
    assert isinstance(made, Vectors)
    many = np.random.default_rng(1).standard_normal((2, 600, HEADS.dim)).astype(np.float32)
    made.calibrate(many, many)
    made.appended(some_keys())
    assert made.select(some_query(), ArrayKeys(HEADS, some_keys())).scored_nbytes == 2 * 191 + 2 * 256 * 16 * FP32


def test_sale_keeps_blocks_that_get_a_part() -> None:
    keys, query = some_keys() * 3, some_query()
    selection = prepared("sale", keys).select(query, ArrayKeys(HEADS, keys))
    rough = restored(*quantised(keys), HEADS.dim)
    assert np.abs(rough - keys).max() <= np.abs(keys).max() / 14 + 1e-6
    for head in range(2):
        shares = dict.fromkeys(blocks_between(), 0.0)
        for q in query.values[head]:
            weights = [math.exp(dot(q, k) / 4.0) for k in rough[head]]
            kept = sum(weights[:8]) + sum(weights[(TOKENS - 8) // 8 * 8 :])
            for block in blocks_between():
                shares[block] = max(shares[block], sum(weights[block * 8 : block * 8 + 8]) / kept)
        worth = {block: share for block, share in shares.items() if share >= 0.004}
        found = [int(block) for block in selection.ids[head] if block in blocks_between()]
        assert found == by_block(worth)
    sharp = replace(query, values=40 * keys[:, :1].repeat(3, axis=1))  # all attention goes to the first token
    few = prepared("sale", keys).select(sharp, ArrayKeys(HEADS, keys))
    assert [len(ids) for ids in few.ids] == [1 + 26 - 24] * 2


def test_sparq_reads_the_largest_channels_only() -> None:
    keys, query = some_keys(), some_query()
    stored = ArrayKeys(HEADS, keys)
    selection = prepared("sparq", keys).select(query, stored)
    for head in range(2):
        sizes = {d: float(sum(abs(float(q[d])) for q in query.values[head])) for d in range(HEADS.dim)}
        channels = top(sizes, 4)
        rows = []
        for q in query.values[head]:
            share = sum(abs(float(q[d])) for d in channels) / sum(abs(float(x)) for x in q)
            logits = [
                sum(float(q[d]) * float(k[d]) for d in channels) / math.sqrt(HEADS.dim * share)
                for k in keys[head, 4 : TOKENS - 8]
            ]
            rows.append(softmax(logits))
        scores = {token: max(row[token - 4] for row in rows) for token in range(4, TOKENS - 8)}
        assert chosen(selection, head) == top(scores, 52)
    # Channels that are not read may hold anything.
    blind = keys.copy()
    blind[0][:, [d for d in range(HEADS.dim) if d not in top_channels(query, 0)]] = np.nan
    again = prepared("sparq", keys).select(query, ArrayKeys(HEADS, blind))
    assert again.ids[0].tolist() == selection.ids[0].tolist()


def top_channels(query: Query, head: int) -> list[int]:
    return top({d: float(np.abs(query.values[head][:, d]).sum()) for d in range(HEADS.dim)}, 4)


def test_needles_are_found_by_those_who_look_at_keys() -> None:
    """One key in 2048 is what the query asks for, at 6 % of the tokens; keys that lie together are alike. Only a window
    misses it."""
    draw = np.random.default_rng(4)
    heads = Heads(kv_heads=1, group=1, dim=64, itemsize=2)
    setting = Setting(budget_tokens=128, recent=16, block_tokens=16)
    found = dict.fromkeys(("window", "quest", "landmark", "sparq", "oracle"), 0)
    for _ in range(20):
        centres = draw.standard_normal((64, 64))
        keys = (np.repeat(centres, 32, axis=0) + 0.3 * draw.standard_normal((2048, 64)))[None].astype(np.float32)
        needle = int(draw.integers(100, 1900))
        query = Query(values=2 * keys[:, needle : needle + 1], tokens=2048)
        for name in found:
            made = policy(name, heads, setting, layer=5)
            made.appended(keys)
            selection = made.select(query, ArrayKeys(heads, keys))
            found[name] += needle in selection.tokens(0, 2048)
    assert found["oracle"] == found["sparq"] == found["quest"] == found["landmark"] == 20
    assert found["window"] <= 4
