"""Time, waiting and bytes by module."""

from __future__ import annotations

import random

from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import MIB, profile_of, streamed
from randomprofiles import profiles, windows

from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import Category, Compute, Memory, Module, Phase, Record, Tier, Wait
from penstock.runtime.profiler.summary import ModuleUse

MS = 1_000_000


def by_path(profile: Profile, **options: tuple[int, int]) -> dict[str, ModuleUse]:
    return {use.path: use for use in summarise(profile, **options).modules}


def test_a_streamed_run_comes_to_the_times_worked_out_on_paper() -> None:
    found = by_path(streamed())
    assert list(found)[-1] == "(root)"  # it did not wait itself
    layer, root = found["layers.1"], found["(root)"]
    assert (layer.kind, layer.calls) == ("Layer", 5)
    assert (layer.total_ns, layer.self_ns, layer.forward_ns) == (30 * MS,) * 3
    assert layer.waited_ns == 20 * MS
    assert layer.moved_nbytes == {"DISK_READ": 50 * MIB}
    assert found["layers.0"].moved_nbytes == {"DISK_READ": 44 * MIB}  # the first read began before the window
    assert (root.calls, root.total_ns, root.self_ns, root.waited_ns) == (5, 200 * MS, 80 * MS, 0)


def test_phases_are_kept_apart_and_a_backward_pass_is_no_second_call() -> None:
    spans: list[Record] = [
        Compute(module=0, phase=Phase.FORWARD, start=0, end=100),
        Compute(module=1, phase=Phase.FORWARD, start=10, end=50, depth=1),
        Compute(module=1, phase=Phase.BACKWARD, start=200, end=260, lane=1),
        Compute(module=1, phase=Phase.OPTIMIZER, start=300, end=305),
    ]
    found = by_path(profile_of(spans))
    use = found["layers.0"]
    assert (use.calls, use.total_ns, use.self_ns) == (1, 105, 105)
    assert (use.forward_ns, use.backward_ns, use.optimizer_ns) == (40, 60, 5)
    assert found["(root)"].self_ns == 60


def test_a_span_whose_parent_was_lost_counts_for_the_one_above_that() -> None:
    spans: list[Record] = [
        Compute(module=0, phase=Phase.FORWARD, start=0, end=100),
        Compute(module=1, phase=Phase.FORWARD, start=0, end=20, depth=1),
        Compute(module=2, phase=Phase.FORWARD, start=40, end=70, depth=2),  # inside a span that is not there
        Compute(module=3, phase=Phase.FORWARD, start=40, end=70, lane=1, depth=2),
    ]
    assert by_path(profile_of(spans))["(root)"].self_ns == 100 - 20 - 30


def test_a_wait_that_names_no_module_is_that_of_the_one_that_leases_the_block() -> None:
    found = by_path(profile_of([Wait(block=2, needed=5, ready=9), Wait(block=-1, needed=0, ready=9)]))
    assert {path: use.waited_ns for path, use in found.items()} == {"layers.2": 4}


@given(st.integers(0, 2**32))
def test_nested_calls_add_up(seed: int) -> None:
    # GIVEN a tree of calls on two lanes, written in any order
    rng = random.Random(seed)
    spans: list[Compute] = []
    own = dict.fromkeys(range(5), 0)
    total = dict.fromkeys(range(5), 0)

    def call(start: int, end: int, lane: int, depth: int) -> None:
        # No module inside itself: its total would count twice.
        module = depth
        spans.append(Compute(module=module, phase=Phase.FORWARD, start=start, end=end, lane=lane, depth=depth))
        total[module] += end - start
        own[module] += end - start
        cuts = sorted(rng.choices(range(start, end + 1), k=2 * rng.randrange(3)))
        for inner, outer in zip(cuts[::2], cuts[1::2], strict=True):
            if depth < 4:
                own[module] -= outer - inner
                call(inner, outer, lane, depth + 1)

    for lane in (0, 1):
        call(0, 40, lane, 0)
        call(40, 100, lane, 0)
    rng.shuffle(spans)
    # THEN every module has its own time and that of what it called
    found = by_path(profile_of(spans), window=(0, 100))
    paths = ["(root)", *(f"layers.{i}" for i in range(4))]
    for module, path in enumerate(paths):
        if total[module]:
            assert (found[path].total_ns, found[path].self_ns) == (total[module], own[module])


def test_a_stack_of_damaged_depths_does_not_hold_up_the_reader() -> None:
    spans = [Compute(module=1, phase=Phase.FORWARD, start=i, end=i + 1, depth=i * 10**12) for i in range(5000)]
    assert by_path(profile_of(spans))["layers.0"].total_ns == 5000


@given(profiles(), windows)
def test_peaks_by_module_agree_with_counting(profile: Profile, window: tuple[int, int]) -> None:
    start, end = window
    last = profile.span()[1] <= end
    instants = [t for t in range(start, end + 1) if t < end or last]
    assume(instants)
    found = by_path(profile, window=window)
    rows = [row for row in profile[Memory].rows() if row["tier"] != Tier.DISK]
    for module, path in enumerate(["(root)", *(f"layers.{i}" for i in range(4))]):
        for category in Category:
            mine = [row for row in rows if (row["module"], row["category"]) == (module, category)]
            levels = [sum(row["nbytes"] for row in mine if row["at"] <= t) for t in instants]
            held = found[path].peak_nbytes if path in found else {}
            assert held.get(category.name, 0) == max(0, *levels)


def test_a_module_that_no_table_knows_is_left_out() -> None:
    spans = [Compute(module=9, phase=Phase.FORWARD, start=0, end=5)]
    assert summarise(profile_of(spans)).modules == ()
    only = profile_of(spans, modules={9: Module(path="", kind="Net", parent=-1)})
    assert summarise(only).modules[0].path == "(root)"
    assert summarise(profile_of(spans, modules={})).modules == ()


@given(profiles(), windows)
def test_times_of_any_records_make_sense(profile: Profile, window: tuple[int, int]) -> None:
    for use in summarise(profile, window=window).modules:
        assert 0 <= use.self_ns <= use.total_ns
        assert use.self_ns == use.forward_ns + use.backward_ns + use.optimizer_ns


def test_memory_of_a_module_is_that_of_all_its_tiers_but_disk() -> None:
    records = [
        Memory(at=at, tier=tier, category=Category.WEIGHT, nbytes=nbytes, module=1)
        for at, tier, nbytes in ((0, Tier.HOST, 5), (1, Tier.DEVICE, 7), (2, Tier.HOST, -5), (3, Tier.DISK, 100))
    ]
    assert by_path(profile_of(records))["layers.0"].peak_nbytes == {"WEIGHT": 12}
    assert by_path(profile_of(records), window=(2, 3))["layers.0"].peak_nbytes == {"WEIGHT": 7}


def _call(start: int, layers: tuple[int, ...] = ()) -> list[Record]:
    """A call of 100, in it the model of 90, in that layers of 20 and 30, where they are recorded."""
    spans: list[Record] = [
        Compute(module=0, phase=Phase.FORWARD, start=start, end=start + 100),
        Compute(module=1, phase=Phase.FORWARD, start=start + 5, end=start + 95, depth=1),
    ]
    spans += [
        Compute(module=m, phase=Phase.FORWARD, start=start + 10 + 30 * i, end=start + 30 + 40 * i, depth=2)
        for i, m in enumerate(layers)
    ]
    return spans


def test_layers_that_were_recorded_in_some_calls_are_told_for_all_of_them() -> None:
    tables = {
        "modules": {
            0: Module(path="", kind="Net", parent=-1),
            1: Module(path="model", kind="Model", parent=0),
            2: Module(path="model.layers.0", kind="Layer", parent=1, sampled=True),
            3: Module(path="model.layers.1", kind="Layer", parent=1, sampled=True),
        }
    }
    spans = _call(0, (2, 3)) + _call(100) + _call(200) + _call(300, (2, 3)) + _call(400) + _call(500)
    long = [Compute(module=0, phase=Phase.FORWARD, start=1000, end=9000)]  # of another length: nothing is known of it
    found = by_path(profile_of(spans + long, **tables))
    assert (found["model.layers.0"].total_ns, found["model.layers.0"].calls) == (3 * 2 * 20, 6)
    assert (found["model.layers.1"].total_ns, found["model.layers.1"].self_ns) == (3 * 2 * 30, 3 * 2 * 30)
    assert (found["model"].total_ns, found["model"].self_ns) == (6 * 90, 6 * 40)
    assert (found["(root)"].total_ns, found["(root)"].self_ns, found["(root)"].calls) == (6 * 100 + 8000, 60 + 8000, 7)
