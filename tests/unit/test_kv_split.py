"""The split between processors and the bound of a step, against trying everything."""

from __future__ import annotations

import msgspec
import pytest
from calibrations import GIB, hardware
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Sharing
from penstock.scheduler.kv.bound import AttendedBytes, decode_bound
from penstock.scheduler.kv.split import GAIN, ColdBlocks, KvRates, ideal_share, rates_of, split

UNIT = 2**20
GB = 1e9
RATE = st.floats(0.1, 200).map(lambda rate: rate * GB)
START = st.sampled_from((0.0, 1e-5, 1e-3))


def slow(cold: ColdBlocks, rates: KvRates, on_cpu: int) -> float:
    """The longest of all that has to be done."""
    assert rates.link is not None
    blocks = cold.host + cold.disk
    copied = blocks - on_cpu
    times = [0.0]
    if on_cpu:
        times.append(on_cpu * UNIT / rates.cpu + rates.cpu_start_s)
    if copied:
        times.append(copied * UNIT / rates.link + rates.link_start_s)
    if rates.device:
        times.append((copied * UNIT + cold.hot_nbytes) / rates.device)
    if cold.disk:
        times.append(cold.disk * UNIT / rates.disk)
    if rates.host_memory:
        times.append((blocks + cold.disk * cold.disk_passes) * UNIT / rates.host_memory)
    return max(times)


@given(
    host=st.integers(0, 60),
    disk=st.integers(0, 60),
    hot=st.integers(0, 200),
    cpu=RATE,
    link=RATE,
    device=st.one_of(st.just(0.0), RATE.map(lambda rate: 10 * rate)),
    read=RATE,
    memory=st.one_of(st.just(0.0), RATE),
    starts=st.tuples(START, START),
    gain=st.sampled_from((0.0, GAIN)),
)
def test_no_other_split_takes_less(
    host: int,
    disk: int,
    hot: int,
    cpu: float,
    link: float,
    device: float,
    read: float,
    memory: float,
    starts: tuple[float, float],
    gain: float,
) -> None:
    cold = ColdBlocks(host=host, disk=disk, block_nbytes=UNIT, hot_nbytes=hot * UNIT)
    rates = KvRates(
        cpu=cpu,
        link=link,
        device=device,
        disk=read,
        host_memory=memory,
        cpu_start_s=starts[0],
        link_start_s=starts[1],
    )
    found = split(cold, rates, gain=gain)
    assert found.cpu_blocks + found.link_blocks == host + disk
    assert found.seconds == pytest.approx(slow(cold, rates, found.cpu_blocks))
    times = [slow(cold, rates, count) for count in range(host + disk + 1)]
    best = min(times)
    if found.cpu_blocks:  # two where it pays, and then as fast as can be
        assert found.seconds == pytest.approx(best)
        assert best <= times[0] * (1 - gain) * (1 + 1e-9)
    else:  # the device alone, where two would save too little
        assert best >= times[0] * (1 - gain) * (1 - 1e-9)
    alone = split(cold, rates, exact=True)
    assert (alone.cpu_blocks, alone.seconds) == (0, pytest.approx(times[0]))


@given(
    device=st.integers(0, 50),
    host=st.integers(0, 50),
    disk=st.integers(0, 50),
    weights=st.integers(0, 50),
    scoring=st.integers(0, 5),
    cpu=RATE,
    link=RATE,
    memory=RATE,
    read=RATE,
    on_device=RATE,
)
def test_no_share_is_faster_than_the_bound(
    device: int,
    host: int,
    disk: int,
    weights: int,
    scoring: int,
    cpu: float,
    link: float,
    memory: float,
    read: float,
    on_device: float,
) -> None:
    rates = KvRates(cpu=cpu, link=link, device=on_device, disk=read, host_memory=memory)
    attended = AttendedBytes(
        device=device * GB, host=host * GB, disk=disk * GB, device_weights=weights * GB, scoring=scoring * GB
    )
    cold = (host + disk) * GB

    def taken(share: float) -> float:
        return max(
            (share * cold + scoring * GB) / cpu,
            (1 - share) * cold / link,
            ((1 - share) * cold + (device + weights) * GB) / on_device,
            disk * GB / read,
            (cold + 2 * disk * GB + scoring * GB) / memory,
        )

    bound = decode_bound(attended, rates)
    assert bound.seconds == pytest.approx(taken(bound.cpu_share))
    for share in (step / 200 for step in range(201)):
        assert bound.seconds <= taken(share) * (1 + 1e-9)


def test_the_share_is_that_of_the_rates() -> None:
    rates = KvRates(cpu=150 * GB, link=25 * GB)
    assert ideal_share(rates) == 150 / 175
    found = split(ColdBlocks(host=1750, block_nbytes=UNIT), rates)
    assert (found.cpu_blocks, found.link_blocks) == (1500, 250)
    assert found.cpu_share == ideal_share(rates)
    # Llama-3.1-8B in fp16, 131072 tokens in host memory: 687 ms streamed, 115 ms by the CPU, 98 ms split.
    everything = AttendedBytes(host=131072 * 131072)
    assert decode_bound(everything, rates).seconds == pytest.approx(0.0982, rel=1e-3)
    streamed = split(ColdBlocks(host=16384, block_nbytes=UNIT), rates, exact=True)
    assert streamed.seconds == pytest.approx(0.687, rel=1e-3)


def test_without_a_device_the_cpu_attends_to_all() -> None:
    rates = KvRates(cpu=10 * GB, disk=2 * GB)
    assert ideal_share(rates) == 1.0
    found = split(ColdBlocks(host=10, disk=10, block_nbytes=UNIT), rates)
    assert (found.cpu_blocks, found.link_blocks, found.binds) == (20, 0, "disk")
    assert decode_bound(AttendedBytes(host=GB, disk=GB), rates).binds == "disk"


def test_while_the_disk_binds_nothing_is_split() -> None:
    rates = KvRates(cpu=10 * GB, link=10 * GB, disk=1 * GB)
    found = split(ColdBlocks(host=2, disk=10, block_nbytes=UNIT), rates)
    assert (found.cpu_blocks, found.binds) == (0, "disk")
    assert decode_bound(AttendedBytes(host=2 * GB, disk=10 * GB), rates).cpu_share == 0.0


def test_rates_come_from_a_calibration_and_prefill_leaves_the_cpu_alone() -> None:
    machine = hardware(gpu=True)
    curve = Curve(x=(1.0, 1024.0), y=(20.0 * GIB, 0.5 * GIB))
    cpu = msgspec.structs.replace(machine.cpu, attention={"bfloat16": curve})
    sharing = Sharing(compute_while_copying=0.5)
    costs = CostModel(hardware=msgspec.structs.replace(machine, cpu=cpu, sharing=sharing))
    decode, prefill = (rates_of(costs, "bfloat16", rows=rows, copy_nbytes=UNIT, read_nbytes=UNIT) for rows in (4, 4096))
    assert decode.link is not None
    assert decode.link == 25 * GIB
    assert decode.disk < 3 * GIB
    assert prefill.cpu == 0.5 * curve.onward(4096) < 0.25 * GIB
    cold = ColdBlocks(host=1000, block_nbytes=UNIT)
    assert split(cold, prefill).cpu_share == 0.0  # it would save 1 %
    assert split(cold, decode).cpu_share == pytest.approx(ideal_share(decode), abs=0.005)
    alone = rates_of(costs, "bfloat16", rows=4, copy_nbytes=UNIT, read_nbytes=UNIT, at_once=False)
    assert alone.cpu == 2 * decode.cpu


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="must be positive"):
        KvRates(cpu=0)
    with pytest.raises(UsageError, match="measure it first"):
        split(ColdBlocks(host=0, disk=1, block_nbytes=1), KvRates(cpu=1, link=1))
    nothing = split(ColdBlocks(host=0, block_nbytes=1), KvRates(cpu=1, link=1))
    assert (nothing.seconds, nothing.cpu_share) == (0.0, 0.0)
