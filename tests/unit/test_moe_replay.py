"""Replays: what is counted adds up, against a plain imitation; seconds follow what is there."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_traces import costs, plain_trace, recipe

from penstock.hardware import load
from penstock.memory.errors import UsageError
from penstock.scheduler.cost import CostModel
from penstock.scheduler.experts.belady import most_hits
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.contest import Contender, compete, compete_over, recipes_around
from penstock.scheduler.experts.costs import ExpertCosts, expert_costs
from penstock.scheduler.experts.events import events_of
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.layerscheduler import LayerScheduler
from penstock.scheduler.experts.policies import POLICIES, policy
from penstock.scheduler.experts.recipe import Recipe
from penstock.scheduler.experts.replay import ReplayResult, ReplaySetting, replay

MACHINE = "rtx4090-1ssd"


def run(asked: Recipe, name: str, setting: ReplaySetting, cost: ExpertCosts | None = None) -> ReplayResult:
    trace = generate_trace(asked)
    routing = trace.header.routing
    scheduler = LayerScheduler(cost) if cost is not None else None
    return replay(routing, events_of(trace), policy(name, routing), setting, scheduler=scheduler, expert_nbytes=10)


def machine_costs(name: str = MACHINE) -> ExpertCosts:
    shape = recipe().expert
    assert shape is not None
    return expert_costs(CostModel(hardware=load(name)), shape)


@settings(max_examples=30)
@given(capacity=st.integers(1, 16), seed=st.integers(0, 100))
def test_lru_of_one_layer_is_that_of_an_ordered_dictionary(capacity: int, seed: int) -> None:
    """One expert per token: no event holds several, whose order within would have to be agreed on."""
    base = recipe(seed=seed, requests=1, prompt=0)
    asked = recipe(seed=seed, requests=1, prompt=0, runners_up=0, routing=replace_routing(base, layers=1, top_k=1))
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in generate_trace(asked).experts[0, :, 0].tolist():
        if expert in held:
            hits += 1
            held.move_to_end(expert)
            continue
        if len(held) == capacity:
            held.popitem(last=False)
        held[expert] = None
    found = run(asked, "lru", ReplaySetting(cache=CacheSetting(capacity=capacity, admission="always")))
    assert sum(found.decode.hits.values()) == hits


def replace_routing(asked: Recipe, **changes: int) -> object:
    import msgspec

    return msgspec.structs.replace(asked.routing, **changes)


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(POLICIES)),
    capacity=st.integers(0, 48),
    host=st.sampled_from([None, 0, 10, 30]),
    prefetch=st.integers(0, 3),
    machine=st.sampled_from([MACHINE, "cpu-only"]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_what_is_counted_adds_up(
    name: str, capacity: int, host: int | None, prefetch: int, machine: str, batch: int, seed: int
) -> None:
    asked = recipe(seed=seed, batch=batch, generate=15)
    cost = machine_costs(machine)
    setting = ReplaySetting(cache=CacheSetting(capacity=capacity), host=host, prefetch=prefetch, between_s=1e-5)
    found = run(asked, name, setting, cost)
    events = events_of(generate_trace(asked))
    for phase in (found.prefill, found.decode):
        assert sum(phase.hits.values()) + sum(phase.misses.values()) == phase.uses
        assert phase.seconds > 0
        assert 0 <= phase.computed_by_cpu <= phase.uses
        assert phase.kept_rate <= phase.hit_rate
    assert found.prefill.uses == sum(len(e.experts) for e in events if e.phase == "prefill")
    assert found.decode.tokens == 2 * 15
    routing = asked.routing
    best = most_hits(routing, events, capacity, bypass=True, phase="decode")
    assert round(found.decode.kept_rate * found.decode.uses) <= best
    if not cost.separate:
        missed = sum(found.decode.misses.values()) + sum(found.prefill.misses.values())
        total = found.decode.read_nbytes + found.prefill.read_nbytes
        assert total >= 10 * missed, "each miss is read"
        if not prefetch:
            assert total == 10 * missed, "once"
        assert found.decode.copied_nbytes == 0
    elif host is None:
        assert found.decode.read_nbytes == found.prefill.read_nbytes == 0


def test_without_costs_there_are_hits_and_bytes() -> None:
    setting = ReplaySetting(cache=CacheSetting(capacity=12))
    found = run(recipe(), "decayed-lfu", setting)
    assert found.decode.seconds == 0
    assert found.decode.copied_nbytes == 10 * sum(found.decode.misses.values())
    assert found.prefetching is None
    with pytest.raises(UsageError, match="name a machine"):
        run(recipe(), "lru", replace(setting, prefetch=1))


def test_causes() -> None:
    trace = plain_trace([[[0]], [[0]], [[1]], [[0]], [[2]], [[1]]], experts=4)
    routing = trace.header.routing
    setting = ReplaySetting(cache=CacheSetting(capacity=1, admission="always"))
    found = replay(routing, events_of(trace), policy("lru", routing), setting).decode
    assert found.hits == {"kept": 1, "filled": 0, "prefetched": 0, "warmed": 0}
    assert found.misses == {"first": 3, "evicted": 2, "passed by": 0}
    setting = ReplaySetting(cache=CacheSetting(capacity=1, admission="better"))
    found = replay(routing, events_of(trace), policy("lfu", routing), setting).decode
    assert found.hits["kept"] == 2
    assert found.misses == {"first": 3, "evicted": 0, "passed by": 1}


def test_prompts_warm_the_cache_and_decoding_finds_it() -> None:
    cold, warm = (
        run(
            recipe(requests=1, prompt=prompt, generate=20),
            "decayed-lfu",
            ReplaySetting(cache=CacheSetting(capacity=24)),
        )
        for prompt in (0, 40)
    )
    assert warm.decode.hits["warmed"] > 0
    assert warm.decode.hit_rate > cold.decode.hit_rate
    assert warm.decode.misses["first"] < cold.decode.misses["first"]


def test_the_cpus_experts_come_into_the_cache_over_an_idle_link() -> None:
    """Where the CPU is always faster than a copy, nothing else would fill it."""
    cost = costs(copy_s=4, cpu=(1, 0), device=(0.01, 0))
    setting = ReplaySetting(cache=CacheSetting(capacity=24), between_s=10)
    found = run(recipe(prompt=0), "decayed-lfu", setting, cost)
    assert found.decode.hits["filled"] > 0
    assert found.decode.hits["kept"] == 0
    busy = run(recipe(prompt=0), "decayed-lfu", replace(setting, between_s=0.0), cost)
    assert busy.decode.hit_rate == 0, "no time to copy in"


def test_prefetching_gains_with_good_advice_and_stops_with_bad() -> None:
    cost = costs(copy_s=4, cpu=(20, 1), device=(3, 0))

    def seconds(noise: float, prefetch: int) -> tuple[float, ReplayResult]:
        setting = ReplaySetting(cache=CacheSetting(capacity=6), prefetch=prefetch, between_s=5)
        found = run(recipe(guess_noise=noise, prompt=0, generate=100), "decayed-lfu", setting, cost)
        return found.decode.seconds, found

    without = seconds(0, 0)[0]
    with_it, found = seconds(0, 2)
    assert with_it < 0.9 * without
    assert found.decode.hits["prefetched"] > 0
    assert found.prefetching is not None
    assert found.prefetching.used == found.prefetching.prefetched, "the advice was right"
    assert found.prefetching.gained_s == pytest.approx(without - with_it, rel=0.3)


def test_more_room_takes_less_time() -> None:
    cost = machine_costs()
    routing = recipe().routing
    times = [
        run(
            recipe(), "decayed-lfu", ReplaySetting(cache=CacheSetting(capacity=round(share * routing.total))), cost
        ).decode.seconds
        for share in (0, 0.25, 0.5, 1)
    ]
    assert times == sorted(times, reverse=True)
    on_disk = run(recipe(), "decayed-lfu", ReplaySetting(cache=CacheSetting(capacity=12), host=12), cost).decode
    assert on_disk.seconds > times[1]
    assert on_disk.read_nbytes > 0


def test_contenders_compete_on_the_same_events() -> None:
    trace = generate_trace(recipe())
    routing = trace.header.routing
    asked = [Contender(policy="lru", admission=rule) for rule in ("adaptive", "better", "always")]
    asked.append(Contender(policy="mrs", minimum=0.0))
    found = dict(compete(routing, events_of(trace), asked, 12, scheduler=LayerScheduler(machine_costs())))
    assert [each.name for each in found] == ["lru", "lru, admits better", "lru, admits always", "mrs, minimum 0"]
    assert len({result.decode.uses for result in found.values()}) == 1
    assert found[asked[1]].decode.hits == found[asked[2]].decode.hits, "what was just used is worth most"


def test_a_map_has_a_cell_per_recipe_and_its_best_is_the_fastest() -> None:
    recipes = list(recipes_around(recipe(requests=1, generate=10)))[::7]
    asked = [Contender(policy=name) for name in ("lru", "lfu")]
    cells = list(compete_over(recipes, asked, 0.25, LayerScheduler(machine_costs())))
    assert [cell.recipe for cell in cells] == recipes
    for cell in cells:
        assert cell.behind(cell.best) == 0
        assert all(cell.behind(each) >= 0 for each in asked)
