"""Belady's bounds against trying everything, and against every policy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_traces import event, recipe

from penstock.scheduler.experts.belady import most_hits
from penstock.scheduler.experts.cache import ADMISSIONS, Admission, CacheSetting, ExpertCache
from penstock.scheduler.experts.events import Event, event_of, events_of
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.policies import POLICIES, policy
from penstock.scheduler.experts.policies.oracle import Oracle, next_uses
from penstock.scheduler.experts.policies.policy import Policy
from penstock.scheduler.experts.shape import Routing


def tried(events: list[Event], capacity: int, *, bypass: bool, phase: str | None = None) -> int:
    """The same by trying every content of the cache after every event."""
    reached = {frozenset(): 0}  # type: dict[frozenset[tuple[int, int]], int]
    for each in events:
        used = frozenset((each.layer, int(expert)) for expert in each.experts)
        counts = phase is None or each.phase == phase
        then: dict[frozenset[tuple[int, int]], int] = {}
        for held, hits in reached.items():
            hits += len(held & used) if counts else 0
            for size in range(capacity + 1):
                for kept in combinations(sorted(held | used), size):
                    content = frozenset(kept)
                    if not bypass and not (used <= content or (content <= used and size == capacity)):
                        continue
                    if hits >= then.get(content, -1):
                        then[content] = hits
        reached = then
    return max(reached.values())


@st.composite
def small_traces(draw: st.DrawFn) -> tuple[Routing, list[Event]]:
    layers, k = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    experts = draw(st.integers(k, 3))
    routing = Routing(layers=layers, experts=experts, top_k=k)
    events = []
    for step in range(draw(st.integers(1, 4 if layers == 2 else 7))):
        prompt = draw(st.booleans())
        for layer in range(layers):
            tokens = draw(st.lists(st.permutations(range(experts)), min_size=1, max_size=2 if prompt else 1))
            events.append(
                event_of(
                    step=step,
                    layer=layer,
                    phase="prefill" if prompt else "decode",
                    experts=experts,
                    chosen=np.array([token[:k] for token in tokens]),
                )
            )
    return routing, events


@settings(max_examples=150)
@given(trace=small_traces(), capacity=st.integers(0, 4), bypass=st.booleans(), decode_only=st.booleans())
def test_min_is_what_trying_everything_finds(
    trace: tuple[Routing, list[Event]], capacity: int, bypass: bool, decode_only: bool
) -> None:
    routing, events = trace
    phase = "decode" if decode_only else None
    found = most_hits(routing, events, capacity, bypass=bypass, phase=phase)  # type: ignore[arg-type]
    assert found == tried(events, capacity, bypass=bypass, phase=phase)


def test_by_hand() -> None:
    routing = Routing(layers=1, experts=4, top_k=1)
    events = [event(0, expert, of=4) for expert in (0, 1, 2, 0, 1, 3, 0, 1)]
    assert most_hits(routing, events, 2, bypass=True) == 4  # 2 and 3 pass by
    assert most_hits(routing, events, 2, bypass=False) == 2
    assert most_hits(routing, events, 1, bypass=True) == 2
    assert most_hits(routing, events, 1, bypass=False) == 0
    assert most_hits(routing, events, 0, bypass=True) == 0
    assert most_hits(routing, events, 4, bypass=False) == 4


def replayed(found: Policy, cache: ExpertCache, events: list[Event]) -> int:
    hits = 0
    for each in events:
        found.seen(each)
        cache.seen(each)
        missed = [int(e) for e in each.experts if not cache.held[each.layer, e]]
        hits += len(each.experts) - len(missed)
        cache.admit(each.layer, missed, needed=each.experts)
    return hits


@settings(max_examples=60)
@given(
    seed=st.integers(0, 500),
    capacity=st.integers(1, 40),
    name=st.sampled_from(list(POLICIES)),
    admission=st.sampled_from(ADMISSIONS),
    minimum=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_no_policy_beats_min(seed: int, capacity: int, name: str, admission: Admission, minimum: float) -> None:
    trace = generate_trace(recipe(requests=1, prompt=0, generate=40, seed=seed))
    routing, events = trace.header.routing, events_of(trace)
    found = policy(name, routing)
    cache = ExpertCache(routing, CacheSetting(capacity=capacity, minimum=minimum, admission=admission), found)
    hits = replayed(found, cache, events)
    assert hits <= most_hits(routing, events, capacity, bypass=True)
    assert most_hits(routing, events, capacity, bypass=False) <= most_hits(routing, events, capacity, bypass=True)


@settings(max_examples=40)
@given(seed=st.integers(0, 500), capacity=st.integers(1, 40))
def test_the_oracle_in_a_cache_of_one_pool_comes_near_min(seed: int, capacity: int) -> None:
    trace = generate_trace(recipe(requests=1, prompt=0, generate=30, seed=seed))
    routing, events = trace.header.routing, events_of(trace)
    oracle = Oracle(routing, events)
    cache = ExpertCache(routing, CacheSetting(capacity=capacity, minimum=0.0, admission="better"), oracle)
    # MIN may give up what an event has just used for something that the same event brought; a cache may not.
    hits, best = replayed(oracle, cache, events), most_hits(routing, events, capacity, bypass=True)
    assert hits <= best
    if capacity > routing.top_k:
        assert hits >= 0.9 * best


def test_next_uses() -> None:
    routing = Routing(layers=2, experts=4, top_k=1)
    events = [event(0, 1, of=4), event(1, 1, of=4), event(0, 1, of=4, phase="prefill"), event(0, 1, of=4)]
    assert [each.tolist() for each in next_uses(routing, events)] == [[2], [np.inf], [3], [np.inf]]
    assert [each.tolist() for each in next_uses(routing, events, phase="decode")] == [[3], [np.inf], [3], [np.inf]]
