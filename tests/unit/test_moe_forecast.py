"""What is foreseen of experts, against a count by hand of the same cache on the same routing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.scheduler.experts.cache import CacheSetting, ExpertCache
from penstock.scheduler.experts.costs import ExpertCosts
from penstock.scheduler.experts.events import events_of
from penstock.scheduler.experts.forecast import EVENTS, LEAST_STEPS, PROMPT, STEPS, expected_trace, foresee_experts
from penstock.scheduler.experts.policies import DEFAULT, policy
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.trace import Trace

ROUTING = Routing(layers=4, experts=16, top_k=2)
HOST = ExpertCosts(cpu_s=lambda rows: 1e-4, device_s=None, read_s=1e-3)
APART = ExpertCosts(cpu_s=lambda rows: 1e-4 * rows, device_s=lambda rows: 1e-5, copy_s=2e-4, read_s=1e-3)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return expected_trace(ROUTING, prompt=24)


def counted(trace: Trace, capacity: int) -> tuple[float, float]:
    """Uses and misses of a decoding step, layer by layer, with the cache itself."""
    ranks = policy(DEFAULT, ROUTING)
    cache = ExpertCache(ROUTING, CacheSetting(capacity=capacity), ranks)
    uses = misses = steps = 0
    for event in events_of(trace):
        ranks.seen(event)
        cache.seen(event)
        missed = [expert for expert in event.experts.tolist() if not cache.held[event.layer, expert]]
        if event.phase == "prefill":
            cache.fill_free(event.layer, missed)
            continue
        uses, misses, steps = uses + len(event.experts), misses + len(missed), steps + (event.layer == 0)
        cache.admit(event.layer, missed, needed=event.experts)
    return uses / steps, misses / steps


@pytest.mark.parametrize("capacity", [0, 5, 16, 40, ROUTING.total])
@pytest.mark.parametrize("costs", [None, HOST])
def test_misses_are_those_of_the_cache_and_each_is_read(trace: Trace, capacity: int, costs: ExpertCosts | None) -> None:
    found = foresee_experts(
        trace, assumed=True, capacity=capacity, host=None, read_nbytes=1000, copied_nbytes=900, costs=costs
    )
    uses, misses = counted(trace, capacity)
    assert (found.uses, found.missed) == (pytest.approx(uses), pytest.approx(misses))
    assert found.read_nbytes == pytest.approx(1000 * misses)
    assert found.copied_nbytes == found.computed_by_cpu == 0
    assert sum(found.hits.values()) == pytest.approx(uses - misses)
    assert found.hit_rate == pytest.approx(1 - misses / uses)
    # a layer waits for what it reads, but for what it computes meanwhile
    if costs is None:
        assert found.waiting_s == 0
    else:
        assert 0.8e-3 * misses <= found.waiting_s <= 1e-3 * misses


def test_beside_a_device_misses_are_copied_and_host_memory_spares_reads(trace: Trace) -> None:
    foreseen = [
        foresee_experts(
            trace,
            assumed=True,
            capacity=8,
            host=host,
            read_nbytes=10,
            copied_nbytes=7,
            costs=APART,
            apart=True,
            exact=True,
        )
        for host in (8, 24, None)
    ]
    assert foreseen[0].read_nbytes > foreseen[1].read_nbytes > foreseen[2].read_nbytes == 0
    for found in foreseen:
        assert found.copied_nbytes == pytest.approx(7 * found.missed)
        assert found.computed_by_cpu == 0


def test_the_cpu_computes_only_where_it_may(trace: Trace) -> None:
    slow = replace(APART, copy_s=1e-2)
    found = {
        exact: foresee_experts(
            trace,
            assumed=True,
            capacity=8,
            host=None,
            read_nbytes=10,
            copied_nbytes=7,
            costs=slow,
            apart=True,
            exact=exact,
        )
        for exact in (False, True)
    }
    assert found[True].computed_by_cpu == 0
    assert found[False].computed_by_cpu > 0
    assert found[False].waiting_s < found[True].waiting_s


def test_beside_a_device_without_costs_misses_are_copied(trace: Trace) -> None:
    each = {"assumed": True, "capacity": 8, "read_nbytes": 10, "copied_nbytes": 7, "costs": None, "apart": True}
    in_memory = foresee_experts(trace, host=None, **each)  # type: ignore[arg-type]
    assert (in_memory.read_nbytes, in_memory.copied_nbytes) == (0, pytest.approx(7 * in_memory.missed))
    on_disk = foresee_experts(trace, host=24, **each)  # type: ignore[arg-type]
    assert on_disk.read_nbytes == pytest.approx(10 * on_disk.missed)


@pytest.mark.parametrize("layers", [1, 16, 100])
def test_made_up_routing_is_as_long_as_there_is_time_for(layers: int) -> None:
    trace = expected_trace(Routing(layers=layers, experts=8, top_k=2), batch=2, prompt=10**6)
    assert trace.steps == 1 + max(LEAST_STEPS, min(STEPS, EVENTS // layers))
    assert trace.tokens == 2 * (PROMPT + trace.steps - 1)
