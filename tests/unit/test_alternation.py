"""What the CPU is given while others go on on the device: against a slow search, and what the answer must depend on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processors import GB, layer, machine

from penstock.memory.errors import DoesNotFitError
from penstock.scheduler.alternation import STEPS, Alternation, Part, Split, spread
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Link
from penstock.scheduler.microbatches import Footprint, Job, Machine, schedule
from penstock.scheduler.processors import ALWAYS, GAIN, Candidate, Traffic, at_rows, crossing_s, held_up_s

NBYTES = 400e6
FOOTPRINT = Footprint(
    kv_nbytes_per_token=100, activation_nbytes_per_token=40, held_nbytes_per_token=20, logits_nbytes_per_sequence=10
)


def alternation(
    costs: CostModel,
    able: Sequence[Part],
    *,
    others: Sequence[Candidate] = (),
    copied_nbytes: float = 0.0,
    disk_s: float = 0.0,
    link_rate: float | None = 12 * GB,
) -> Alternation:
    return Alternation(
        costs,
        able=able,
        others=others,
        copied_nbytes=copied_nbytes,
        copied=frozenset(each.block for each in others) if copied_nbytes else frozenset(),
        disk_s=disk_s,
        link_rate=link_rate,
    )


def blocks(count: int, below: int = ALWAYS, keys: float = 0.0) -> list[Part]:
    return [Part(blocks=(layer(NBYTES),), rows_below=below, keys=keys)] * count


def switching(costs: CostModel, seconds: float) -> CostModel:
    """The same machine, on which waking a thread takes so long."""
    cpu = msgspec.structs.replace(costs.hardware.cpu, switch_s=seconds)
    return CostModel(hardware=msgspec.structs.replace(costs.hardware, cpu=cpu))


def device_s(costs: CostModel, candidates: Sequence[Candidate], rows: int) -> float:
    return costs.compute_s((at_rows(o, rows) for each in candidates for o in each.operations), "gpu")


@settings(max_examples=100, deadline=None)
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
def test_the_best_of_all_shares_within_their_bounds(
    cpu: float, link: float, able: int, others: int, copied: float, disk_s: float, rows: int, lanes: int
) -> None:
    """No sweep is shorter than the busiest of all, or longer than all that both processors do, one after the other."""
    costs = machine(cpu=cpu * GB, link=link * GB)
    made = alternation(
        costs,
        blocks(able),
        others=[layer(NBYTES)] * others,
        copied_nbytes=copied,
        disk_s=disk_s,
        link_rate=link * GB,
    )
    computing = held_up_s(layer(NBYTES), costs, rows, Traffic(copying=True, reading=disk_s > 0))
    part_s = computing + crossing_s(layer(NBYTES), costs, rows) + costs.hand_over_s
    block_s = device_s(costs, [layer(NBYTES)], rows)

    def bounds(share: float) -> tuple[float, float]:
        chosen = len(spread([NBYTES] * able, share))
        moved = max(disk_s, (copied + (able - chosen) * NBYTES) / (link * GB))
        device, processor = lanes * (others + able - chosen) * block_s, lanes * chosen * part_s
        handing = lanes * (chosen * costs.hand_over_s + (others + able - chosen) * costs.switch_s)
        return max(moved, device, processor), max(moved, device + processor + handing)

    tried = {step / STEPS: made.of(step / STEPS, rows=rows, lanes=lanes) for step in range(STEPS + 1)}
    for share, split in tried.items():
        least, most = bounds(share)
        assert least * (1 - 1e-9) <= split.seconds <= most * (1 + 1e-9)
    found, one = made.best(rows=rows, lanes=lanes), tried[0.0].seconds
    two = min((s.seconds for share, s in tried.items() if spread([NBYTES] * able, share)), default=one)
    assert found.seconds == (two if two <= (1 - GAIN) * one else one)
    assert bool(found.cpu_share) is (two <= (1 - GAIN) * one and able > 0)


def exactly(costs: CostModel, seconds: float) -> CostModel:
    """The machine on which nothing but products takes time: a block as long on either processor."""
    curves = {"bfloat16": Curve.flat(NBYTES / seconds)}
    processors = [
        msgspec.structs.replace(each, linear=curves, launch_s=0.0)
        for each in (costs.hardware.cpu, costs.hardware.gpu)
        if each is not None
    ]
    link = Link(h2d=Curve.flat(1e15), d2h=Curve.flat(1e15))
    return CostModel(hardware=msgspec.structs.replace(costs.hardware, cpu=processors[0], gpu=processors[1], link=link))


def numbered(*numbers: int) -> list[Candidate]:
    return [layer(NBYTES, block=number, row_nbytes=0.0) for number in numbers]


def passing(able: Sequence[int], others: Sequence[int], lanes: int) -> float:
    """Seconds of a sweep, where each block takes one second on either processor and the CPU gets all it can."""
    parts = [Part(blocks=(each,), rows_below=ALWAYS) for each in numbered(*able)]
    return (
        alternation(exactly(machine(), 1.0), parts, others=numbered(*others), link_rate=None)
        .of(1.0, rows=1, lanes=lanes)
        .seconds
    )


def test_stretches_and_parts_that_meet() -> None:
    """D C D C: two lanes take turns, and one second more. D D C D: where two meet the longer one counts. All of the
    device's behind all of the CPU's: they do not meet, but for the one of who is ahead."""
    assert passing([2, 4], [1, 3], 1) == pytest.approx(4)
    assert passing([2, 4], [1, 3], 2) == pytest.approx(5)
    assert passing([2, 4], [1, 3], 3) == pytest.approx(7)
    assert passing([3], [1, 2, 4], 2) == pytest.approx(2 + 2 + 1 + 1)
    assert passing([1, 2, 3], [4, 5, 6], 2) == pytest.approx(3 + 3 + 3 + 2)


@given(sizes=st.lists(st.integers(0, 100), max_size=30), share=st.floats(0, 1))
def test_whole_parts_make_up_a_share(sizes: list[int], share: float) -> None:
    chosen = spread(sizes, share)
    assert chosen == sorted(set(chosen))
    assert abs(sum(sizes[place] for place in chosen) - share * sum(sizes)) <= max(sizes, default=0) + 1e-9
    assert spread(sizes, 0.0) == []
    assert spread(sizes, 1.0) == [place for place, size in enumerate(sizes) if size]


def test_hand_overs_that_cost_more_than_they_save_are_not_made() -> None:
    """Copying takes 267 ms per sweep, 33 for each block. With 5 ms for each coming and going two processors pay, with
    100 ms they do not; and between them fewer blocks cross."""
    shares = [
        alternation(switching(machine(), seconds), blocks(8)).best(rows=1, lanes=2).cpu_share
        for seconds in (0.0, 5e-3, 15e-3, 0.1)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2] > shares[3] == 0.0


def test_keys_and_values_go_no_further_than_their_room() -> None:
    """Each of 8 layers has an eighth of the cache; the host has room for 3.2 of them."""
    free = alternation(machine(), blocks(8, keys=1 / 8)).best(rows=1, lanes=2)
    assert free.keys == 5 / 8
    bound = alternation(machine(), blocks(8, keys=1 / 8)).best(rows=1, lanes=2, most_keys=0.4)
    assert bound.keys == 3 / 8
    assert bound.seconds > free.seconds
    assert alternation(machine(), blocks(8, keys=1 / 8)).best(rows=1, lanes=2, most_keys=0.1).cpu_share == 0.0
    assert alternation(machine(), blocks(8)).best(rows=1, lanes=2, most_keys=0.0).keys == 0.0


@pytest.mark.parametrize("layers", [9, 18, 36, 48])
def test_shares_that_sum_to_a_little_more_than_one_are_all_and_no_more(layers: int) -> None:
    assert sum([1 / layers] * layers) > 1.0
    slow = alternation(machine(), blocks(layers, keys=1 / layers), link_rate=GB / 10)
    assert slow.best(rows=1, lanes=2).cpu_share == 1.0  # the link would bind whatever is copied


def test_an_emulated_device_has_no_cores_of_its_own() -> None:
    """Two lanes that compute at once take the sum; only copies are saved."""
    real = machine(cpu=900 * GB, link=30 * GB)
    cpu = msgspec.structs.replace(real.hardware.cpu, cores=2)
    emulated = CostModel(hardware=msgspec.structs.replace(real.hardware, cpu=cpu, gpu=cpu, emulated=True))
    half = CostModel(hardware=emulated.hardware, threads=1)
    both, each = (alternation(costs, blocks(8)).of(0.5, rows=64, lanes=2).seconds for costs in (emulated, half))
    assert both == pytest.approx(2 * each, rel=0.25)
    assert emulated.processors_at_once == 1.0
    assert half.processors_at_once == real.processors_at_once == 2.0


def test_a_link_that_binds_is_relieved_until_the_cpu_binds_too() -> None:
    """Two lanes: copying a block takes 33 ms, computing it on the CPU twice 20 ms. 5 of 8 on the CPU balance."""
    split = alternation(machine(), blocks(8)).best(rows=1, lanes=2)
    assert len(spread([NBYTES] * 8, split.cpu_share)) == 5
    assert split.seconds == pytest.approx(8 * NBYTES / (12 * GB) * 3 / 8, rel=0.1)


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


def test_the_hosts_room_for_keys_and_values_bounds_what_the_cpu_gets() -> None:
    """8 prompts of 80 tokens leave 64 000 bytes. The host has room for none of them, for half, for all."""
    jobs = [Job(index=index, prompt_tokens=16, new_tokens=64) for index in range(8)]
    shares = []
    for room in (0, 32_000, 64_000, None):
        there = Machine(
            room_nbytes=10**9,
            weights_nbytes=int(8 * NBYTES),
            sweep_s=8 * NBYTES / (12 * GB),
            memory_rate=1e12,
            alternation=alternation(machine(), blocks(8, keys=1 / 8)),
            host_room_nbytes=room,
        )
        shares.append(schedule(jobs, FOOTPRINT, there, rows=4, lanes=2).cpu_share)
    assert shares[0] == 0.0
    assert len(spread([NBYTES] * 8, shares[1])) == 4
    assert len(spread([NBYTES] * 8, shares[2])) == 5
    assert shares[2] == shares[3]
