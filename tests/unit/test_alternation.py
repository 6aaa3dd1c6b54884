"""What the CPU is given while others go on on the device: against a slow search, and what the answer must depend on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processors import GB, layer, machine

from penstock.memory.errors import DoesNotFitError
from penstock.scheduler.alternation import STEPS, Alternation, Split
from penstock.scheduler.cost import CostModel
from penstock.scheduler.microbatches import Footprint, Job, Machine, schedule
from penstock.scheduler.processors import ALWAYS, GAIN, Candidate, Traffic, at_rows, cpu_s

NBYTES = 400e6
FOOTPRINT = Footprint(
    kv_nbytes_per_token=100, activation_nbytes_per_token=40, held_nbytes_per_token=20, logits_nbytes_per_sequence=10
)


def alternation(
    costs: CostModel,
    able: Sequence[tuple[Candidate, int]],
    *,
    others: Sequence[Candidate] = (),
    copied_nbytes: float = 0.0,
    disk_s: float = 0.0,
    link_rate: float | None = 12 * GB,
) -> Alternation:
    return Alternation(costs, able=able, others=others, copied_nbytes=copied_nbytes, disk_s=disk_s, link_rate=link_rate)


def blocks(count: int, below: int = ALWAYS) -> list[tuple[Candidate, int]]:
    return [(layer(NBYTES), below)] * count


def device_s(costs: CostModel, candidates: Sequence[Candidate], rows: int) -> float:
    return costs.compute_s((at_rows(o, rows) for each in candidates for o in each.operations), "gpu")


@settings(max_examples=100)
@given(
    cpu=st.floats(5, 400),
    link=st.floats(1, 100),
    able=st.integers(0, 6),
    others=st.integers(0, 6),
    copied=st.floats(0, 4e9),
    disk_s=st.sampled_from([0.0, 0.01, 0.5]),
    rows=st.integers(1, 64),
    lanes=st.integers(1, 8),
)
def test_the_busiest_of_all_is_least(
    cpu: float, link: float, able: int, others: int, copied: float, disk_s: float, rows: int, lanes: int
) -> None:
    costs = machine(cpu=cpu * GB, link=link * GB)
    found = alternation(
        costs,
        blocks(able),
        others=[layer(NBYTES)] * others,
        copied_nbytes=copied,
        disk_s=disk_s,
        link_rate=link * GB,
    ).best(rows=rows, lanes=lanes)

    def seconds(share: float) -> float:
        on_cpu = able * cpu_s(layer(NBYTES), costs, rows, Traffic(copying=True, reading=disk_s > 0))
        elsewhere = device_s(costs, [layer(NBYTES)] * others, rows)
        here = device_s(costs, [layer(NBYTES)] * able, rows)
        device, processor = lanes * (elsewhere + (1 - share) * here), lanes * share * on_cpu
        computing = max(device, processor) if lanes > 1 else device + processor
        return max(disk_s, (copied + (1 - share) * able * NBYTES) / (link * GB), computing)

    tried = {step / STEPS: seconds(step / STEPS) for step in range(1, STEPS + 1)}
    least = min(tried.values())
    assert found.seconds == pytest.approx(seconds(found.cpu_share))
    if found.cpu_share:
        assert found.seconds == pytest.approx(least)
        assert found.seconds <= (1 - GAIN) * seconds(0.0) * (1 + 1e-9)
    else:
        assert not able or least >= (1 - GAIN) * seconds(0.0) * (1 - 1e-9)


def test_a_link_that_binds_is_relieved_until_the_cpu_binds_too() -> None:
    """Two lanes: copying a block takes 33 ms, computing it on the CPU twice 20 ms. 10/16 of them on the CPU balance."""
    split = alternation(machine(), blocks(8)).best(rows=1, lanes=2)
    assert split.cpu_share == 10 / 16
    assert split.seconds == pytest.approx(8 * NBYTES / (12 * GB) * 6 / 16, rel=0.1)


def test_more_lanes_leave_less_to_the_cpu() -> None:
    shares = [alternation(machine(), blocks(8)).best(rows=1, lanes=lanes).cpu_share for lanes in (2, 3, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0]


def test_nothing_is_gained_where_the_disk_binds_or_the_link_is_fast() -> None:
    assert alternation(machine(), blocks(8), disk_s=1.0).best(rows=1, lanes=2) == Split(cpu_share=0.0, seconds=1.0)
    fast = alternation(machine(cpu=5 * GB, link=2000 * GB), blocks(8), link_rate=2000 * GB)
    assert fast.best(rows=1, lanes=2).cpu_share == 0.0


def test_blocks_that_the_cpu_does_not_compute_at_these_rows() -> None:
    some = alternation(machine(), blocks(8, below=4))
    assert some.best(rows=3, lanes=2).cpu_share > 0
    none = some.best(rows=4, lanes=2)
    assert none.cpu_share == 0.0
    assert none.seconds == pytest.approx(8 * NBYTES / (12 * GB))


def choice(alternation: Alternation | None, prompts: int = 8) -> tuple[float, float]:
    jobs = [Job(index=index, prompt_tokens=16, new_tokens=64) for index in range(prompts)]
    there = Machine(
        room_nbytes=10**9, weights_nbytes=int(8 * NBYTES), sweep_s=8 * NBYTES / (12 * GB), memory_rate=1e12,
        alternation=alternation,
    )  # fmt: skip
    found = schedule(jobs, FOOTPRINT, there)
    return found.cpu_share, found.seconds


def test_the_schedule_gives_the_cpu_its_share_where_that_pays() -> None:
    alone, alone_s = choice(None)
    share, seconds = choice(alternation(machine(), blocks(8)))
    assert alone == 0.0
    assert share > 0
    assert seconds < 0.95 * alone_s
    assert choice(alternation(machine(), blocks(8, below=1)))[0] == 0.0


def test_what_does_not_fit_does_not_fit_on_two_processors() -> None:
    jobs = [Job(index=0, prompt_tokens=16, new_tokens=64)]
    there = Machine(room_nbytes=10, weights_nbytes=10, sweep_s=1.0, alternation=alternation(machine(), blocks(2)))
    with pytest.raises(DoesNotFitError):
        schedule(jobs, FOOTPRINT, there)
