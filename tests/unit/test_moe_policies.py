"""Policies rank experts as they say; caches keep what is ranked highest, and nobody's minimum is taken."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_traces import event, plain_trace, recipe

from penstock.memory.errors import UsageError
from penstock.scheduler.experts.cache import ADMISSIONS, Admission, CacheSetting, ExpertCache, Origin, minimums
from penstock.scheduler.experts.events import Event, event_of, events_of, merged
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.policies import POLICIES, policy
from penstock.scheduler.experts.policies.class_lru import ClassLru
from penstock.scheduler.experts.policies.decayed_lfu import DecayedLfu
from penstock.scheduler.experts.policies.lru import Lru
from penstock.scheduler.experts.policies.mrs import Mrs
from penstock.scheduler.experts.policies.oracle import Oracle
from penstock.scheduler.experts.policies.policy import Policy
from penstock.scheduler.experts.policies.static import Static
from penstock.scheduler.experts.shape import Routing

ROUTING = Routing(layers=2, experts=16, top_k=2)
ROUTING_OF_RECIPES = recipe().routing


def ranked(found: Policy, layer: int) -> list[int]:
    """Experts of a layer that are worth anything, the best first."""
    values = found.values[layer]
    return [int(expert) for expert in np.argsort(-values, kind="stable") if values[expert] > 0]


def after(found: Policy, *events: Event) -> Policy:
    for each in events:
        found.seen(each)
    return found


def test_lru_ranks_by_last_use() -> None:
    found = after(Lru(ROUTING), event(0, 1, 2), event(0, 2, 3), event(0, 5, 1))
    assert ranked(found, 0) == [1, 5, 2, 3]
    assert ranked(found, 1) == []


def test_lfu_ranks_by_tokens() -> None:
    prompt = event_of(step=0, layer=0, phase="prefill", experts=16, chosen=np.array([[1, 2], [1, 3], [1, 4]]))
    assert ranked(after(policy("lfu", ROUTING), prompt, event(0, 2, 5), event(0, 2, 5)), 0) == [1, 2, 5, 3, 4]


def test_decayed_counts_are_those_of_adding_up_every_use() -> None:
    half_life = 5.0
    trace = generate_trace(recipe(prompt=0, generate=30))
    found = DecayedLfu(trace.header.routing, half_life=half_life)
    slow: Counter[tuple[int, int]] = Counter()
    for each in events_of(trace):
        for expert in range(16):
            slow[each.layer, expert] *= 2 ** (-1 / half_life)  # type: ignore[assignment]
        for expert in each.experts.tolist():
            slow[each.layer, expert] += 1
        found.seen(each)
        mean = (1 - 2 ** (-1 / half_life)) / (math.log(2) / half_life)  # a token's use, at its middle
        for expert in range(16):
            assert found.values[each.layer, expert] == pytest.approx(slow[each.layer, expert] * mean, abs=1e-9)


def test_decayed_counts_of_a_prompt_are_those_of_its_tokens_one_by_one() -> None:
    """To what is not known of a prompt: where in it an expert was used."""
    tokens = np.stack([np.arange(400) % 2, 2 + np.arange(400) % 3], axis=1)
    at_once = DecayedLfu(ROUTING, half_life=40)
    at_once.seen(event_of(step=0, layer=0, phase="prefill", experts=16, chosen=tokens))
    single = after(DecayedLfu(ROUTING, half_life=40), *(event(0, *token) for token in tokens.tolist()))
    assert np.allclose(at_once.values[0], single.values[0], rtol=0.05)


def test_decayed_counts_neither_overflow_nor_forget_what_is_near() -> None:
    found = DecayedLfu(ROUTING, half_life=1.0)
    for number in range(5000):
        found.seen(event(0, number % 3, 5 + number % 2))
    assert np.all(np.isfinite(found.values))
    assert ranked(found, 0)[:2] == [6, 1]
    huge = event_of(step=0, layer=0, phase="prefill", experts=16, chosen=np.tile([[7, 8]], (10_000, 1)))
    found.seen(huge)
    assert np.all(np.isfinite(found.values))
    assert set(ranked(found, 0)[:2]) == {7, 8}


def test_class_lru_lets_a_class_go_before_recency() -> None:
    often = [event(0, 1, 2)] * 4
    found = after(ClassLru(ROUTING), *often, event(0, 3, 4), event(0, 3, 5))
    assert ranked(found, 0)[:3] in ([1, 2, 3], [2, 1, 3])
    assert ranked(found, 0)[3:] == [5, 4], "one class: by last use"


def test_mrs_is_its_formula() -> None:
    found = Mrs(ROUTING, alpha=0.25)
    scores = np.array([[0.4, 0.3, 0.2, 0.06, 0.04]])
    candidates = np.array([[3, 1, 7, 9, 2]])
    given = event_of(
        step=0, layer=1, phase="decode", experts=16, chosen=candidates[:, :2], candidates=candidates, scores=scores
    )
    slow = np.zeros(16)
    for _ in range(3):
        top = np.zeros(16)
        top[[3, 1, 7, 9]] = [0.4, 0.3, 0.2, 0.06]  # 2 · K of them
        slow = 0.25 * top + 0.75 * slow
        found.seen(given)
    assert np.allclose(found.values[1], slow)
    assert np.all(found.values[0] == 0)
    with pytest.raises(ValueError, match="alpha is 0"):
        Mrs(ROUTING, alpha=0)


def test_static_learns_and_then_stays() -> None:
    found = after(Static(ROUTING, learning=3), *[event(0, 1, 2)] * 2, event(0, 1, 3), *[event(0, 8, 9)] * 50)
    assert ranked(found, 0) == [1, 2, 3]
    assert found.values[0, 1] == 3
    assert ranked(after(Static(ROUTING, counts=np.eye(2, 16)), event(1, 5, 6)), 1) == [1]


@pytest.mark.parametrize("name", list(POLICIES))
def test_earlier_is_the_value_that_experts_would_have_had_the_event_used_none(name: str) -> None:
    trace = generate_trace(recipe(generate=12))
    routing, (*before, last) = trace.header.routing, events_of(trace)
    found = after(policy(name, routing), *before, last)
    unused = np.setdiff1d(np.arange(routing.experts), [*last.experts, *last.candidates])
    assert np.allclose(found.earlier[unused], found.values[last.layer, unused])
    assert np.all(found.earlier <= found.values[last.layer])
    if name != "static":
        assert np.all(found.earlier[last.experts] < found.values[last.layer, last.experts])


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'arc' is not known: use lru, lfu, decayed-lfu"):
        policy("arc", ROUTING)


def test_merged_micro_batches_need_each_expert_once() -> None:
    def part(*tokens: tuple[int, int]) -> Event:
        scores = np.tile([[0.5, 0.25]], (len(tokens), 1))
        chosen = np.array(tokens)
        return event_of(step=0, layer=0, phase="decode", experts=16, chosen=chosen, candidates=chosen, scores=scores)

    whole, parts = part((1, 2), (2, 3), (2, 9)), [part((1, 2)), part((2, 3), (2, 9))]
    found = merged(parts)
    assert found.tokens == 3
    for name in ("experts", "rows", "candidates", "scores"):
        assert np.allclose(getattr(found, name), getattr(whole, name))
    with pytest.raises(ValueError, match="of one layer"):
        merged([event(0, 1, 2), event(1, 1, 2)])


@settings(max_examples=200)
@given(layers=st.integers(1, 9), slots=st.integers(0, 40), share=st.floats(0, 1))
def test_minimums_are_spread_evenly_and_never_more_than_there_is(layers: int, slots: int, share: float) -> None:
    found = minimums(layers, slots, share)
    assert len(found) == layers
    assert found.sum() <= slots
    assert found.max() - found.min() <= 1
    if share > 0:
        assert found.sum() >= min(slots, layers), "while there are slots, one each"
    if share == 1:
        assert found.sum() == slots


def run(cache: ExpertCache, found: Policy, events: list[Event]) -> int:
    """All misses are brought; hits."""
    hits = 0
    for each in events:
        found.seen(each)
        cache.seen(each)
        missed = [int(e) for e in each.experts if not cache.held[each.layer, e]]
        hits += len(each.experts) - len(missed)
        cache.admit(each.layer, missed, needed=each.experts)
    return hits


@settings(max_examples=120)
@given(
    name=st.sampled_from([*POLICIES, "oracle"]),
    capacity=st.integers(0, 50),
    minimum=st.sampled_from([0.0, 0.3, 1.0]),
    admission=st.sampled_from(ADMISSIONS),
    seed=st.integers(0, 1000),
)
def test_whatever_happens_a_cache_keeps_its_promises(
    name: str, capacity: int, minimum: float, admission: Admission, seed: int
) -> None:
    trace = generate_trace(recipe(requests=1, prompt=0, generate=25, seed=seed))
    routing = trace.header.routing
    events = events_of(trace)
    ranking = Oracle(routing, events) if name == "oracle" else policy(name, routing)
    cache = ExpertCache(routing, CacheSetting(capacity=capacity, minimum=minimum, admission=admission), ranking)
    for each in events:
        before = cache.held.copy()
        ranking.seen(each)
        cache.seen(each)
        missed = [int(e) for e in each.experts if not before[each.layer, e]]
        taken = cache.admit(each.layer, missed, needed=each.experts)
        assert np.all(cache.held[each.layer, each.experts] >= before[each.layer, each.experts]), "still needed"
        assert cache.held.sum() <= capacity
        held = cache.held.sum(axis=1)
        dropped = before.sum(axis=1) > held
        assert not np.any(dropped & (held < cache.minimums)), "nobody is pushed below its minimum"
        assert {expert for expert, _ in taken} == {e for e in missed if cache.held[each.layer, e]}
        for expert, victim in taken:
            if victim is not None and admission == "better":
                assert ranking.values[each.layer, expert] > ranking.values[victim]
            if victim is not None and admission == "proven":
                assert ranking.earlier[expert] > ranking.values[victim]
        assert np.array_equal(cache.origins > 0, cache.held)
    found = cache.statistics()
    assert found.held == found.admitted - found.evicted == cache.held.sum()


def test_what_a_layer_needs_is_no_victim_even_where_nothing_else_is_there() -> None:
    routing = Routing(layers=1, experts=8, top_k=2)
    found = Lru(routing)
    cache = ExpertCache(routing, CacheSetting(capacity=1), found)
    first = event(0, 3, of=8)
    found.seen(first)
    cache.admit(0, [3], needed=first.experts)
    both = event(0, 3, 4, of=8)
    found.seen(both)
    assert cache.admit(0, [4], needed=both.experts) == []
    assert cache.held[0].tolist() == [expert == 3 for expert in range(8)]
    assert cache.statistics().bypassed == 1


def test_of_equals_the_layer_whose_turn_comes_latest_gives_first() -> None:
    routing = Routing(layers=3, experts=4, top_k=1)
    found = policy("lfu", routing)
    cache = ExpertCache(routing, CacheSetting(capacity=3, minimum=0.0, admission="always"), found)
    for layer in range(3):
        each = event(layer, 0, of=4)
        found.seen(each)
        cache.admit(layer, [0], needed=each.experts)
    each = event(1, 2, of=4)
    found.seen(each)
    assert cache.admit(1, [2], needed=each.experts) == [(2, (1, 0))], "its own: not used again for a whole sweep"
    each = event(1, 3, of=4)
    found.seen(each)
    found.values[0, 0] = found.values[2, 0] = 0.5
    assert cache.admit(1, [3], needed=each.experts) == [(3, (0, 0))], "layer 2 comes before layer 0"


def test_a_prompt_fills_what_is_free_and_evicts_nothing() -> None:
    routing = Routing(layers=2, experts=8, top_k=2)
    found = DecayedLfu(routing)
    cache = ExpertCache(routing, CacheSetting(capacity=6), found)
    chosen = np.array([[0, 1], [0, 2], [0, 2], [0, 3], [4, 5]])
    prompt = event_of(step=0, layer=0, phase="prefill", experts=8, chosen=chosen)
    found.seen(prompt)
    assert cache.fill_free(0, prompt.experts.tolist()) == [0, 2, 1], "by use, and no more than the layer's part"
    assert cache.origins[0, 0] == Origin.WARMED
    found.seen(prompt)
    assert cache.fill_free(0, [3, 4]) == []
    assert cache.held[0].sum() == 3
    cache.drop(0, 2)
    assert cache.fill_free(0, [3, 4]) == [3]


def test_a_cache_smaller_than_a_token_degrades_and_does_not_starve() -> None:
    """One pool of LRU hits nothing then: what is needed next is what was used longest ago."""
    routing = Routing(layers=8, experts=32, top_k=4)
    events = events_of(generate_trace(recipe(routing=routing, prompt=0, generate=120)))
    capacity = 20  # of 32 that a token uses

    def hits(name: str, *, minimum: float) -> int:
        found = policy(name, routing)
        setting = CacheSetting(capacity=capacity, minimum=minimum, admission="always" if name == "lru" else "proven")
        return run(ExpertCache(routing, setting, found), found, events)

    assert hits("lru", minimum=0.0) == 0
    assert hits("lru", minimum=1.0) > 0
    assert hits("decayed-lfu", minimum=1.0) > hits("lru", minimum=1.0)


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("admission", ["proven", "adaptive"])
@pytest.mark.parametrize(("capacity", "turn"), [(1, 4), (2, 12), (3, 6), (5, 12), (8, 6), (13, 12), (20, 24)])
def test_no_capacity_gets_nothing_from_turns_that_defeat_recency(
    name: str, admission: Admission, capacity: int, turn: int
) -> None:
    """The tokens of each layer take turns over more experts than it has slots."""
    choices = [[[(2 * t) % turn, (2 * t + 1) % turn] for _ in range(3)] for t in range(100)]
    trace = plain_trace(choices, experts=24)
    found = policy(name, trace.header.routing)
    cache = ExpertCache(trace.header.routing, CacheSetting(capacity=capacity, admission=admission), found)
    assert run(cache, found, events_of(trace)) > 0


def test_adaptive_is_always_as_long_as_that_hits() -> None:
    events = events_of(generate_trace(recipe(prompt=0, generate=200)))

    def hits(admission: Admission) -> int:
        found = policy("mrs", ROUTING_OF_RECIPES)
        setting = CacheSetting(capacity=24, admission=admission)
        return run(ExpertCache(ROUTING_OF_RECIPES, setting, found), found, events)

    assert hits("adaptive") == hits("always") != hits("proven")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="a cache of -1 experts"):
        CacheSetting(capacity=-1)
    with pytest.raises(UsageError, match=r"a minimum of 1\.5"):
        CacheSetting(capacity=1, minimum=1.5)
