from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.schedule import Slots, Task, TaskGraph, simulate


def test_a_lane_runs_its_tasks_in_order_and_lanes_overlap() -> None:
    graph = TaskGraph()
    first = graph.add("read 0", "disk", 2)
    second = graph.add("read 1", "disk", 2)
    used = graph.add("use 0", "gpu", 3, after=[first])
    graph.add("use 1", "gpu", 3, after=[second])
    schedule = graph.simulate()
    assert schedule.start == (0, 2, 2, 5)
    assert schedule.end[used] == 5
    assert schedule.makespan == 8
    assert schedule.busy == {"disk": 4, "gpu": 6}


def test_a_queue_of_one_makes_production_wait_for_use() -> None:
    graph, slots = TaskGraph(), Slots(1)
    for layer in range(3):
        read = graph.add(f"read {layer}", "disk", 2, after=slots.take())
        slots.use(graph.add(f"use {layer}", "gpu", 3, after=[read]))
    assert graph.simulate().makespan == 15


def test_a_queue_of_two_overlaps() -> None:
    graph, slots = TaskGraph(), Slots(2)
    for layer in range(3):
        read = graph.add(f"read {layer}", "disk", 2, after=slots.take())
        slots.use(graph.add(f"use {layer}", "gpu", 3, after=[read]))
    # read 0..2, use 2..5, 5..8, 8..11; the third read waits for the first use.
    schedule = graph.simulate()
    assert schedule.start[4] == 5
    assert schedule.makespan == 11


def test_a_barrier_waits_for_everything_before_it() -> None:
    graph = TaskGraph()
    graph.add("copy", "h2d", 5)
    graph.add("compute", "gpu", 1)
    barrier = graph.barrier()
    after = graph.add("next", "gpu", 1, after=[barrier])
    assert graph.simulate().start[after] == 5


def test_two_that_share_get_half_each_and_the_rest_goes_to_the_one_that_is_left() -> None:
    graph = TaskGraph({"dram": 10.0})
    graph.add("copy", "h2d", 1, shared="dram", nbytes=10)
    graph.add("multiply", "cpu", 2, shared="dram", nbytes=20)
    # Both want 10 and get 5: the copy ends at 2; of the product 10 are left, at 10 per second.
    assert graph.simulate().end == (2, 3)


def test_who_can_use_little_is_not_slowed() -> None:
    graph = TaskGraph({"dram": 10.0})
    graph.add("slow", "h2d", 5, shared="dram", nbytes=10)
    graph.add("greedy", "cpu", 0, shared="dram", nbytes=40)
    assert graph.simulate().end == (5, 5)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_absurd_times_are_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="must be 0 or more"):
        TaskGraph().add("x", "gpu", seconds)


def test_waiting_for_what_was_not_issued_is_refused() -> None:
    with pytest.raises(UsageError, match="issued before"):
        TaskGraph().add("x", after=[0])


def test_a_queue_whose_items_are_never_used_is_refused() -> None:
    slots = Slots(1)
    slots.take()
    with pytest.raises(UsageError, match="none has a user"):
        slots.take()


@st.composite
def graphs(draw: st.DrawFn, *, share: bool) -> list[Task]:
    tasks: list[Task] = []
    for place in range(draw(st.integers(1, 12))):
        after = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        tasks.append(
            Task(
                name=str(place),
                lane=draw(st.sampled_from(["", "a", "b", "c"])),
                seconds=draw(st.integers(0, 8)) / 2,
                after=tuple(sorted(after)),
                shared=draw(st.sampled_from(["", "dram"])) if share else "",
                nbytes=draw(st.integers(0, 6)) if share else 0,
            )
        )
    return tasks


@given(graphs(share=False))
@settings(max_examples=300, deadline=None)
def test_without_sharing_each_starts_when_all_that_it_waits_for_have_ended(tasks: list[Task]) -> None:
    ends: list[float] = []
    for place, task in enumerate(tasks):
        waits = [ends[each] for each in task.after]
        waits += [ends[each] for each in range(place) if task.lane and tasks[each].lane == task.lane]
        ends.append(max(waits, default=0.0) + task.seconds)
    assert simulate(tasks, {}).end == pytest.approx(ends)


def ticked(tasks: list[Task], rate: float, tick: float) -> list[float]:
    """The same in small steps of time, as plainly as possible."""
    left = [1.0] * len(tasks)
    end: list[float | None] = [None] * len(tasks)
    now = 0.0

    def done(place: int) -> bool:
        return end[place] is not None

    while not all(done(place) for place in range(len(tasks))):
        for _ in tasks:  # what takes no time may end in chains
            for place, task in enumerate(tasks):
                if (
                    not done(place)
                    and not task.seconds
                    and not (task.shared and task.nbytes)
                    and free(tasks, end, place)
                ):
                    end[place] = now
        running = [p for p in range(len(tasks)) if not done(p) and free(tasks, end, p)]
        sharing = [p for p in running if tasks[p].shared and tasks[p].nbytes]
        level = rate / len(sharing) if sharing else 0.0
        for _ in range(40):  # raise the level until the rate is used up, or everyone has enough
            used = sum(min(level, want(tasks[p])) for p in sharing)
            greedy = [p for p in sharing if want(tasks[p]) > level]
            if not greedy or used >= rate:
                break
            level += (rate - used) / len(greedy)
        for p in running:
            speed = min(level, want(tasks[p])) / tasks[p].nbytes if p in sharing else 1 / tasks[p].seconds
            left[p] -= speed * tick
        now += tick
        for p in running:
            if left[p] <= 1e-9:
                end[p] = now
    return [each for each in end if each is not None]


def want(task: Task) -> float:
    return task.nbytes / task.seconds if task.seconds else float("inf")


def free(tasks: list[Task], end: list[float | None], place: int) -> bool:
    before = [p for p in range(place) if tasks[place].lane and tasks[p].lane == tasks[place].lane]
    return all(end[p] is not None for p in (*tasks[place].after, *before))


@given(graphs(share=True))
@settings(max_examples=60, deadline=None)
def test_with_sharing_it_agrees_with_small_steps_of_time(tasks: list[Task]) -> None:
    tasks = [
        t if t.shared or not t.nbytes else Task(name=t.name, lane=t.lane, seconds=t.seconds, after=t.after)
        for t in tasks
    ]
    tick = 0.02
    assert simulate(tasks, {"dram": 4.0}).end == pytest.approx(ticked(tasks, 4.0, tick), abs=tick * (len(tasks) + 1))
