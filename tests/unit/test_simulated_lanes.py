"""Several lanes on a simulated clock: sweeps worked out on paper, and the choice against what comes of it."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulator import MIB, machine, program

from penstock.scheduler.alternation import Alternation, Part, spread
from penstock.scheduler.cost import CostModel
from penstock.scheduler.hardware import Hardware
from penstock.scheduler.operations import Operation
from penstock.scheduler.processors import Candidate
from penstock.scheduler.setting import Ring, Setting
from penstock.scheduler.simulated import Moved
from penstock.scheduler.simulator import Prediction, simulate

LAYERS = 10
NBYTES = 10 * MIB


def where(layers: int = LAYERS, *, ring: int = 3, spare: int = 1, below: int = 8) -> Setting:
    """All blocks stay on the host, and the CPU can compute each."""
    return Setting(
        moved={i: Moved(read_nbytes=NBYTES, copied_nbytes=NBYTES) for i in range(layers)},
        front=Ring(permanent={}, slots=ring, slot_nbytes=NBYTES),
        back=Ring(permanent=dict.fromkeys(range(layers), NBYTES), slots=2, slot_nbytes=NBYTES),
        uses={f"layers.{i}": (i,) for i in range(layers)},
        on_cpu=dict.fromkeys(range(layers), below),
        spare_slots=spare,
    )


def run(
    hardware: Hardware,
    compute_nbytes: float,
    part: frozenset[int],
    *,
    lanes: int = 2,
    layers: int = LAYERS,
    calls: int = 8,
) -> Prediction:
    programs = [program(layers, compute_nbytes)] * calls
    return simulate(where(layers), programs, CostModel(hardware=hardware), lanes=lanes, part=part)


def with_switches(hardware: Hardware, seconds: float) -> Hardware:
    """A machine on which handing over takes so long, and nothing else has a latency."""
    return msgspec.structs.replace(hardware, cpu=msgspec.structs.replace(hardware.cpu, switch_s=seconds))


def test_one_copy_serves_all_lanes() -> None:
    """A layer takes 0.05 s to copy, and each of three lanes 0.01 s to compute: the link binds."""
    found = run(machine(link=200 * MIB), 10 * MIB, frozenset(), lanes=3)
    assert found.seconds("decode") == pytest.approx(LAYERS * 0.05, rel=0.01)
    assert len(found.turns) == 8
    assert found.turns[-1].tokens == 3
    assert found.copied_nbytes <= 9 * LAYERS * NBYTES  # one more sweep, ahead of the end


def test_lanes_take_turns_on_a_device_that_binds() -> None:
    """A layer takes 0.1 s to compute, and 0.005 s to copy: two lanes take twice as long as one."""
    found = run(machine(link=2000 * MIB), 100 * MIB, frozenset())
    assert found.seconds("decode") == pytest.approx(2 * LAYERS * 0.1, rel=0.01)


def test_two_processors_work_at_once() -> None:
    """Every other layer is the CPU's. Both take 0.1 s for a layer: each lane is where the other one was, and the sweep
    takes what one of them takes, and one layer more, in which the first or the last has nobody beside it."""
    found = run(machine(link=2000 * MIB), 100 * MIB, frozenset(range(1, LAYERS, 2)))
    assert found.seconds("decode") == pytest.approx(LAYERS * 0.1 + 0.1, rel=0.01)


def test_a_hand_over_takes_its_time_on_both() -> None:
    """The same with 0.01 s until a lane goes on: ten layers of the sweep, on either processor, and the one more."""
    hardware = with_switches(machine(link=2000 * MIB), 0.01)
    found = run(hardware, 100 * MIB, frozenset(range(1, LAYERS, 2)))
    assert found.seconds("decode") == pytest.approx((LAYERS + 1) * 0.11, rel=0.03)


def test_an_emulated_device_is_the_cpus_own_cores() -> None:
    """All of them compute either lane: two at once take as long as one after the other."""
    hardware = msgspec.structs.replace(
        machine(link=2000 * MIB), emulated=True, cpu=msgspec.structs.replace(machine().cpu, cores=2)
    )
    programs = [program(LAYERS, 100 * MIB)] * 6
    part = frozenset(range(1, LAYERS, 2))
    both, each = (
        simulate(where(), programs, CostModel(hardware=hardware, threads=threads), lanes=2, part=part).seconds("decode")
        for threads in (2, 1)
    )
    assert both == pytest.approx(2 * LAYERS * 0.1, rel=0.01)
    assert each == pytest.approx(LAYERS * 0.1 + 0.1, rel=0.01)


def test_what_the_cpu_computes_is_not_copied_and_the_rest_once() -> None:
    found = run(machine(link=200 * MIB), 10 * MIB, frozenset(range(0, LAYERS, 2)))
    copies = Counter(record.block for record in found.records if record.kind == "copy")
    swept = {block: count for block, count in copies.items() if block % 2}
    assert set(swept) == set(range(1, LAYERS, 2))
    assert max(swept.values()) <= 9
    assert all(copies[block] <= 2 for block in range(0, LAYERS, 2)), "guessed before the first sweep, at the most"
    assert found.seconds("decode") == pytest.approx(5 * 0.05, rel=0.1)


def test_calls_of_many_rows_are_computed_on_the_device() -> None:
    """A prompt of 64 rows is copied all 10 layers, but for those that the ring of 3 has at the start; then tokens 5."""
    part = frozenset(range(1, LAYERS, 2))
    hardware = machine(link=200 * MIB)
    prompt = program(LAYERS, 10 * MIB, title="prefill")
    many = msgspec.structs.replace(
        prompt,
        events=tuple(
            msgspec.structs.replace(each, rows=64) if isinstance(each, Operation) else each for each in prompt.events
        ),
    )
    found = simulate(
        where(), [many, *[program(LAYERS, 10 * MIB)] * 5], CostModel(hardware=hardware), lanes=2, part=part
    )
    assert [turn.title for turn in found.turns] == ["prefill"] + ["decode"] * 5
    assert 7 * 0.05 <= found.turns[0].seconds <= LAYERS * 0.05 * 1.1
    assert found.turns[-1].seconds == pytest.approx(5 * 0.05, rel=0.1)


def test_sweeps_end_when_they_have_become_steady() -> None:
    programs = [program(LAYERS, 10 * MIB)] * 50
    found = simulate(
        where(),
        programs,
        CostModel(hardware=machine(link=200 * MIB)),
        lanes=2,
        part=frozenset({1, 5}),
        until_steady=True,
    )
    assert 3 <= len(found.turns) < 10


@settings(max_examples=15, deadline=None)
@given(
    link=st.floats(50, 3000),
    compute=st.floats(0.1, 300),
    switch=st.sampled_from([0.0, 1e-3, 2e-2]),
    lanes=st.integers(2, 4),
    layers=st.integers(6, 12),
)
def test_what_is_chosen_is_never_slower_and_takes_about_what_was_said(
    link: float, compute: float, switch: float, lanes: int, layers: int
) -> None:
    hardware = with_switches(machine(link=link * MIB), switch)
    cost = CostModel(hardware=hardware)
    candidates = [
        Candidate(block=i, operations=(Operation(kind="linear", nbytes=compute * MIB),), nbytes=NBYTES)
        for i in range(layers)
    ]
    alternation = Alternation(
        cost,
        able=[Part(blocks=(each,), rows_below=8) for each in candidates],
        others=(),
        copied_nbytes=0,
        copied=(),
        disk_s=0.0,
        link_rate=link * MIB,
    )
    split = alternation.best(rows=1, lanes=lanes)
    chosen = frozenset(spread([NBYTES] * layers, split.cpu_share))
    programs = [program(layers, compute * MIB)] * 6
    one, two = (
        simulate(where(layers), programs, cost, lanes=lanes, part=part).seconds("decode")
        for part in (frozenset(), chosen)
    )
    assert two <= one * 1.001
    if chosen:
        assert two <= split.seconds * 1.3
    copied = layers - len(chosen)
    if copied > 3:  # as many of them as the ring has slots may stay there from sweep to sweep
        changes_s = lanes * copied * switch  # where one runs ahead of another by a block, they change less often
        assert two >= (split.seconds - changes_s) * 0.9 * (copied - 3) / copied
