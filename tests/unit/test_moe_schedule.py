"""The four timelines by hand; the best schedule against trying all orders; the scheduler against the best."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_traces import costs, task

from benchmarks.moe_layers import random_layer
from penstock.hardware import load
from penstock.memory.errors import UsageError
from penstock.scheduler.cost import CostModel
from penstock.scheduler.experts.bruteforce import best_layer
from penstock.scheduler.experts.costs import ExpertCosts, expert_costs
from penstock.scheduler.experts.greedy import greedy_assignment
from penstock.scheduler.experts.layerbound import least_s
from penstock.scheduler.experts.layerscheduler import LayerScheduler
from penstock.scheduler.experts.shape import ExpertShape
from penstock.scheduler.experts.timelines import Assignment, ExpertTask, needs_read, run_layer
from penstock.scheduler.hardware import Sharing


def spans(found: object, resource: str) -> list[tuple[int, float, float]]:
    return [(s.task, s.start_s, s.end_s) for s in found.spans if s.resource == resource]  # type: ignore[attr-defined]


def test_a_layer_by_hand() -> None:
    tasks = [task(0, 10, device=True), task(1, 5), task(2, 1), task(3, 3, host=False), task(4, 2, host=False)]
    assignment = Assignment(on_cpu=(False, False, True, False, True), reads=(3, 4))
    found = run_layer(tasks, costs(), assignment)
    assert spans(found, "disk") == [(3, 0, 10), (4, 10, 20)]
    assert spans(found, "link") == [(1, 0, 4), (3, 10, 14)]
    assert spans(found, "device") == [(0, 0, 2), (1, 4, 5.5), (3, 14, pytest.approx(15.3))]
    assert spans(found, "cpu") == [(2, 0, 3), (4, 20, 24)]
    assert found.seconds == 24
    assert found.busy_s("cpu") == 7
    assert found.last_s("link") == 14


def test_the_link_takes_what_keeps_the_device_busy_longest() -> None:
    tasks = [task(0, 1), task(1, 50), task(2, 20)]
    found = run_layer(tasks, costs(), Assignment(on_cpu=(False,) * 3, reads=()))
    assert [each[0] for each in spans(found, "link")] == [1, 2, 0]


def test_the_first_expert_of_the_cpu_waits_for_the_crossing() -> None:
    tasks = [task(0), task(1)]
    found = run_layer(tasks, costs(cpu_start_s=0.5), Assignment(on_cpu=(True, True), reads=()))
    assert found.seconds == 6.5


def test_what_shares_memory_slows_each_other() -> None:
    sharing = Sharing(compute_while_copying=0.5, copy_while_computing=0.8)
    tasks = [task(0, 4), task(1, 1)]  # 6 s of the CPU; 4 s of the link
    found = run_layer(tasks, costs(sharing=sharing), Assignment(on_cpu=(True, False), reads=()))
    # The copy takes 4 / 0.8 = 5 s; by then the CPU has done 2.5 of its 6 s.
    assert spans(found, "link") == [(1, 0, pytest.approx(5))]
    assert spans(found, "cpu") == [(0, 0, pytest.approx(8.5))]


def test_without_a_device_the_cpu_computes_what_is_read() -> None:
    tasks = [task(0, 1), task(1, 1, host=False), task(2, 4, host=False)]
    plan = LayerScheduler(costs(device=None)).plan(tasks)
    assert set(plan.computed_by_cpu) == {0, 1, 2}
    assert plan.read == (2, 1), "what takes longest afterwards first"
    assert plan.copied == ()
    assert plan.seconds == 23


@st.composite
def layers(draw: st.DrawFn, most: int = 5) -> tuple[list[ExpertTask], ExpertCosts]:
    rows = st.sampled_from([1, 1, 2, 3, 8])
    place = st.sampled_from([(True, True), (True, False), (False, True), (False, True), (False, False)])
    drawn = draw(st.lists(st.tuples(rows, place), min_size=1, max_size=most))
    tasks = [task(n, count, device=device, host=host) for n, (count, (device, host)) in enumerate(drawn)]
    times = st.floats(0.2, 5)
    share = st.sampled_from([1.0, 1.0, 0.7])
    sharing = Sharing(
        compute_while_copying=draw(share), copy_while_computing=draw(share),
        compute_while_reading=draw(share), read_while_computing=draw(share),
    )  # fmt: skip
    return tasks, costs(
        copy_s=draw(times), read_s=draw(times), cpu=(draw(times), draw(times)), device=(draw(times), draw(times) / 10),
        cpu_start_s=draw(st.sampled_from([0.0, 0.5])), sharing=sharing,
    )  # fmt: skip


@settings(max_examples=150)
@given(layer=layers(), seed=st.integers(0, 2**32 - 1))
def test_each_expert_is_computed_once_after_it_is_there_and_moved_at_most_once(
    layer: tuple[list[ExpertTask], ExpertCosts], seed: int
) -> None:
    tasks, cost = layer
    random = np.random.default_rng(seed)
    on_cpu = tuple(bool(random.integers(2)) for _ in tasks)
    reads = [n for n, t in enumerate(tasks) if needs_read(t, on_cpu[n])]
    random.shuffle(reads)
    found = run_layer(tasks, cost, Assignment(on_cpu=on_cpu, reads=tuple(reads)))
    at = {(s.resource, s.task): s for s in found.spans}
    assert len(at) == len(found.spans), "nothing twice"
    for number, each in enumerate(tasks):
        chain = [("disk", number)] if number in reads else []
        if on_cpu[number]:
            chain.append(("cpu", number))
        else:
            chain += [] if each.on_device else [("link", number)]
            chain.append(("device", number))
        assert {key for key in at if key[1] == number} == set(chain)
        for before, then in pairwise(chain):
            assert at[before].end_s <= at[then].start_s + 1e-9
    for resource in ("cpu", "device", "link", "disk"):
        own = sorted((s.start_s, s.end_s) for s in found.spans if s.resource == resource)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(own)), "one thing at a time"
    assert found.seconds == max(s.end_s for s in found.spans if s.resource in ("cpu", "device"))
    assert found.seconds >= least_s(tasks, cost, on_cpu) - 1e-9


def every_order(tasks: list[ExpertTask], cost: ExpertCosts) -> float:
    """The least time over all assignments and all orders of reading whatsoever."""
    best = float("inf")
    for on_cpu in product([False, True], repeat=len(tasks)):
        read = [n for n, t in enumerate(tasks) if needs_read(t, on_cpu[n])]
        for reads in permutations(read):
            best = min(best, run_layer(tasks, cost, Assignment(on_cpu=on_cpu, reads=reads)).seconds)
    return best


@settings(max_examples=120)
@given(layer=layers(most=4))
def test_the_best_of_brute_force_is_that_of_every_order(layer: tuple[list[ExpertTask], ExpertCosts]) -> None:
    tasks, cost = layer
    found = best_layer(tasks, cost)[1].seconds
    if cost.sharing == Sharing():
        assert found == pytest.approx(every_order(tasks, cost))
    else:  # where memory is shared, orders of one processor's reads are a rule of thumb
        assert every_order(tasks, cost) <= found * (1 + 1e-9)
        assert found <= 1.02 * every_order(tasks, cost)


def johnson(jobs: list[tuple[float, float]]) -> float:
    """The least makespan of two machines in a row, by trying all orders."""
    best = float("inf")
    for order in permutations(jobs):
        first = second = 0.0
        for a, b in order:
            first += a
            second = max(second, first) + b
        best = min(best, second)
    return best


@settings(max_examples=60)
@given(rows=st.lists(st.integers(1, 60), min_size=1, max_size=6), copy_s=st.floats(0.5, 6))
def test_the_links_order_is_the_best_there_is(rows: list[int], copy_s: float) -> None:
    cost = costs(copy_s=copy_s)
    tasks = [task(n, count) for n, count in enumerate(rows)]
    found = run_layer(tasks, cost, Assignment(on_cpu=(False,) * len(rows), reads=()))
    assert found.seconds == pytest.approx(johnson([(copy_s, 1 + 0.1 * count) for count in rows]))


def test_brute_force_ends_at_twelve() -> None:
    with pytest.raises(UsageError, match="13 experts: trying everything"):
        best_layer([task(n) for n in range(13)], costs())


def test_hybrimoes_order() -> None:
    """By hand: the device takes what is there, the link the largest, the CPU the smallest."""
    tasks = [task(0, 1), task(1, 9), task(2, 4), task(3, 2, device=True)]
    cost = costs(copy_s=4, cpu=(0, 1.5), device=(1, 0))
    # CPU: expert 0 until 1.5; device: 3 until 1; link: 1 until 4, device until 5; CPU: 2 until 7.5, the link until 8.
    assert greedy_assignment(tasks, cost) == (True, False, True, False)


def test_the_scheduler_is_within_five_percent_of_the_best() -> None:
    """benchmarks/moe_schedule.py does the same with 1000."""
    worst, total = 0.0, 0.0
    for seed in range(60):
        layer = random_layer(seed)
        best = best_layer(layer.tasks, layer.costs)[1].seconds
        found = LayerScheduler(layer.costs).plan(layer.tasks).seconds
        assert found >= best * (1 - 1e-9)
        worst = max(worst, found / best - 1)
        total += found / best - 1
    assert worst <= 0.05
    assert total / 60 <= 0.005


def test_a_plan_is_remembered_and_names_the_experts_of_the_layer_at_hand() -> None:
    scheduler = LayerScheduler(costs())
    first = scheduler.plan([task(3, 2), task(7, 1, device=True), task(9, 1)])
    again = scheduler.plan([task(4, 1), task(1, 1, device=True), task(8, 2)])
    assert again.timeline is first.timeline
    assert set(first.computed_by_cpu) <= {3, 9}
    assert {*again.computed_by_cpu, *again.copied} == {4, 8}


def test_a_prompt_of_many_experts_is_planned_in_bounded_time_and_well() -> None:
    random = np.random.default_rng(1)
    cost = expert_costs(CostModel(hardware=load("rtx4090-1ssd")), ExpertShape(hidden=2048, ffn=768))
    tasks = [
        task(n, int(rows), device=n % 4 == 0, host=n % 8 != 1) for n, rows in enumerate(random.integers(1, 200, 128))
    ]
    plan = LayerScheduler(cost).plan(tasks)
    assert plan.seconds <= 1.1 * least_s(plan.tasks, cost, plan.assignment.on_cpu)
    only_device = LayerScheduler(cost, tries=0).plan(tasks)
    assert plan.seconds <= only_device.seconds


def test_costs_come_from_a_machines_curves() -> None:
    machine = load("rtx4090-1ssd")
    shape = ExpertShape(hidden=4096, ffn=14336)
    found = expert_costs(CostModel(hardware=machine), shape)
    assert shape.nbytes == 3 * 4096 * 14336 * 2
    assert found.copy_s == pytest.approx(shape.nbytes / 26e9)
    assert found.read_s == pytest.approx(shape.nbytes / 6.7e9)
    assert found.cpu_s(1) == pytest.approx(shape.nbytes / (83.2e9 * 0.6), rel=0.02)
    assert found.device_s is not None
    assert found.device_s(1) < found.cpu_s(1) < found.copy_s
    assert found.cpu_s(4096) > 100 * found.device_s(4096)
    alone = expert_costs(CostModel(hardware=load("cpu-only")), shape)
    assert not alone.separate
    assert alone.copy_s == alone.cpu_start_s == 0
