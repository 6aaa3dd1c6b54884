"""What `max_memory` may say."""

import pytest

from penstock.budget import MemoryBudget, parse_budget
from penstock.memory.errors import UsageError

GIB = 2**30


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        ("auto", MemoryBudget()),
        ({}, MemoryBudget()),
        ("device=8GiB,host=48GiB", MemoryBudget(device=8 * GIB, host=48 * GIB)),
        (" device = 8GiB , disk = auto ", MemoryBudget(device=8 * GIB)),
        ({"host": 3 * GIB, "disk": "500GB"}, MemoryBudget(host=3 * GIB, disk=500 * 10**9)),
        ({"host": "auto", "device": 0}, MemoryBudget(device=0)),
        (MemoryBudget(host=1), MemoryBudget(host=1)),
    ],
)
def test_values(value: str | dict[str, int | str] | MemoryBudget, budget: MemoryBudget) -> None:
    assert parse_budget(value) == budget


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"cpu": "8GiB"}, "there is no tier 'cpu': write 'host'"),
        ({0: "8GiB"}, "there is no tier 0: write 'device'"),
        ({"cuda:1": "8GiB"}, "there is no tier 'cuda:1': write 'device'"),
        ("gpu=8GiB", "write 'device'"),
        ("hots=8GiB", "there is no tier 'hots': write 'host'"),
        ("nvme=8GiB", "write 'disk'"),
        ("Device=8GiB", "write 'device'"),
        ({"banana": 1}, "there is no tier 'banana'. Tiers are device, host, disk."),
        ({None: 1}, "there is no tier None"),
        ("host=8G", "host budget: '8G' is ambiguous: write 8GiB (2^30) or 8GB (10^9)"),
        ("host=", "host budget: '' is not a size"),
        ("8GiB", "'8GiB' in '8GiB' names no tier: write for example host=8GiB"),
        ("", "names no tier"),
        ("host=1GiB,", "names no tier"),
        ("host=1GiB,host=2GiB", "the host budget is given twice"),
        ({"host": -1}, "cannot be negative"),
        ({"host": True}, "host budget"),
        ({"host": None}, "host budget"),
        (8 * GIB, "max_memory is 'auto', a string"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_right_words(value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(value)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_budget_made_by_hand_is_checked_too() -> None:
    with pytest.raises(UsageError, match="device budget cannot be negative"):
        MemoryBudget(device=-1)
