"""What the device updates: the share with which an update takes least, by trying all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trainstep import machine

from penstock.memory.errors import UsageError
from penstock.scheduler.cost import CostModel
from penstock.scheduler.sharing import is_taken
from penstock.scheduler.stepload import UpdateWork
from penstock.scheduler.updating import GAIN, ON_CPU, PARTS, UpdateTimes, check_where, choose, times

WORK = UpdateWork(nbytes=96.0, operations=10, elements=2**18)
"""On paper: 96 bytes of memory traffic per element at 1e10 bytes per second are 9.6 ns; on the CPU, whose memory the
arrays come from and go back to, 12 ns."""


def ask(link: float | None, where: str = "auto") -> tuple[float, float]:
    cost = CostModel(hardware=machine(link=link))
    found = choose(where, cost, WORK, arrays=3, itemsize=2, shard_elements=2**20)  # type: ignore[arg-type]
    return found.in_memory, found.on_disk


def test_a_slow_link_leaves_all_to_the_cpu() -> None:
    assert ask(link=4e8) == (0.0, 0.0)  # weights alone take 10 ns


def test_both_work_at_once_where_the_link_is_fast() -> None:
    """(1 - x) 12 = 9.6 x at x = 0.56, which is 9 of 16 parts. What passes through a drive waits for that: 36 ns."""
    assert ask(link=1e12) == (9 / 16, 0.0)


def test_a_link_of_the_right_rate_is_given_what_it_can_carry() -> None:
    """(1 - x) 12 = (4 + 14 x) / 3 crosses at x = 0.64, and computing bounds the device's part as before."""
    assert ask(link=3e9) == (9 / 16, 0.0)
    share, _ = ask(link=1.5e9)
    exact = (12 - 4 / 1.5) / (12 + 14 / 1.5)
    assert abs(share - exact) <= 0.5 / PARTS + 1e-9


@pytest.mark.parametrize(("where", "share"), [("cpu", 0.0), ("device", 1.0)])
def test_what_a_user_says_counts(where: str, share: float) -> None:
    assert ask(link=1e12, where=where) == (share, share)
    found = choose(where, None, WORK, arrays=3, itemsize=2, shard_elements=2**20)  # type: ignore[arg-type]
    assert (found.in_memory, found.on_disk) == (share, share)
    assert "as asked for" in found.why


def test_an_unknown_machine_and_one_without_a_device_leave_all_to_the_cpu() -> None:
    found = choose("auto", None, WORK, arrays=3, itemsize=2, shard_elements=2**20)
    assert not found.any
    assert "penstock calibrate" in found.why
    assert ask(link=None) == (0.0, 0.0)
    assert not ON_CPU.any


def test_other_words_are_refused() -> None:
    for known in ("auto", "cpu", "device"):
        check_where(known)
    with pytest.raises(UsageError, match="use auto, cpu, device"):
        check_where("gpu")


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, positive, positive, positive, st.floats(0, 1e3))
def test_no_other_share_takes_less(
    cpu: float, device: float, up: float, down: float, other_up: float, other_down: float, disk: float
) -> None:
    found = UpdateTimes(cpu=cpu, device=device, up=up, down=down, other_up=other_up, other_down=other_down, disk=disk)
    share = found.best()
    best = min(found.at(part / PARTS) for part in range(PARTS + 1))
    if share:
        assert found.at(share) == best
        assert best <= (1 - GAIN) * found.at(0.0)
        assert all(found.at(part / PARTS) > best for part in range(int(share * PARTS)))
    else:
        assert best > (1 - GAIN) * found.at(0.0) or best == found.at(0.0)


@given(st.integers(0, PARTS), st.integers(1, 200))
def test_shards_are_spread_evenly(parts: int, count: int) -> None:
    share = parts / PARTS
    chosen = [is_taken(index, share) for index in range(count)]
    for stop in range(count + 1):
        assert sum(chosen[:stop]) == int(stop * share)


def test_checksums_and_the_drive_are_in_what_is_on_disk() -> None:
    cost = CostModel(hardware=machine(link=1e10, read=1e9, write=5e8))
    kept, read = (
        times(cost, WORK, arrays=3, itemsize=2, shard_elements=2**20, checked=checked) for checked in (False, True)
    )
    assert kept.disk == 0
    assert read.disk == pytest.approx(12 / 1e9 + 12 / 5e8)
    assert kept.cpu == pytest.approx(12e-9, rel=0.01)
    assert read.cpu - kept.cpu == pytest.approx(24 / 8.5e9)
    assert kept.up == pytest.approx(14 / 1e10)


def test_a_device_with_little_memory_leaves_it_to_weights() -> None:
    cost = CostModel(hardware=machine(link=1e12))
    asked: dict[str, Any] = {"arrays": 3, "itemsize": 2, "shard_elements": 2**20, "needed_nbytes": 100}
    assert not choose("auto", cost, WORK, **asked, device_nbytes=799).any
    assert choose("auto", cost, WORK, **asked, device_nbytes=800).any
    assert choose("auto", cost, WORK, **asked).any
    assert choose("device", cost, WORK, **asked, device_nbytes=1).any
