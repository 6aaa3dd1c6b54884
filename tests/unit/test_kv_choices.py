"""Each policy of selection against a slow reference of its own rule."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_selections import (
    FP32,
    HEADS,
    SETTING,
    TOKENS,
    attend,
    blocks_between,
    by_block,
    chosen,
    dot,
    prepared,
    softmax,
    some_keys,
    some_query,
    top,
)

from penstock.memory.errors import UsageError
from penstock.scheduler.kv.arraykeys import ArrayKeys
from penstock.scheduler.kv.policies import policies, policy
from penstock.scheduler.kv.policies.codebook import assign, fit_codebook
from penstock.scheduler.kv.policies.policy import (
    FloatArray,
    Heads,
    IntArray,
    Query,
    Seen,
    Setting,
)
from penstock.scheduler.kv.policies.quest import upper_bounds
from penstock.scheduler.kv.policies.sale import quantised, restored
from penstock.scheduler.kv.policies.snapkv import pooled
from penstock.scheduler.kv.policies.vectors import Vectors
from penstock.scheduler.kv.recall import attention


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
    steps = []
    for more, last in ((52, 32), (2, 30), (3, 29)):  # the window moves by 4
        first = len(steps)
        steps += [attend(made, keys, TOKENS, seed=seed, prompt=False) for seed in range(first, first + more)]
        selection = made.select(some_query(), ArrayKeys(HEADS, keys))
        for head in range(2):
            sums = {token: float(sum(step[head][token] for step in steps[-last:])) for token in range(4, TOKENS - 28)}
            assert selection.ids[head].tolist() == [*range(4), *top(sums, 32), *range(TOKENS - 28, TOKENS)]
    made.cropped(100, ArrayKeys(HEADS, keys))
    for _ in range(40):  # what was attended to behind the crop is forgotten as well
        made.attended(Seen(tokens=(np.arange(0),) * 2, mass=(np.zeros(0, np.float32),) * 2))
    made.appended(keys[:, 100:])
    made.attended(Seen(tokens=(np.array([50]),) * 2, mass=(np.array([1.0], np.float32),) * 2))
    assert 50 in made.select(some_query(), ArrayKeys(HEADS, keys)).ids[0]


def test_alisa_takes_nothing_from_tokens_that_are_new_at_old_places() -> None:
    """After a crop, steps that leave the window had attended to other tokens there."""
    keys = some_keys()
    made = policy("alisa", HEADS, SETTING, layer=5)
    made.appended(keys)
    for seed in range(32):
        attend(made, keys, TOKENS, seed=seed, prompt=False)
    made.cropped(60, ArrayKeys(HEADS, keys))
    made.appended(keys[:, 60:])
    steps = [attend(made, keys, TOKENS, seed=seed, prompt=False) for seed in range(100, 132)]
    selection = made.select(some_query(), ArrayKeys(HEADS, keys))
    for head in range(2):
        sums = {token: float(sum(step[head][token] for step in steps)) for token in range(4, TOKENS - 28)}
        assert selection.ids[head].tolist() == [*range(4), *top(sums, 32), *range(TOKENS - 28, TOKENS)]


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
