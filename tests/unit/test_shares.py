"""Shares as people write them."""

import pytest

from penstock.memory.errors import UsageError
from penstock.shares import parse_share


@pytest.mark.parametrize(
    ("value", "share"),
    [("5%", 0.05), ("0.05", 0.05), (0.05, 0.05), (1, 1.0), ("150%", 1.5), (" 20 %", 0.2), ("0", 0.0)],
)
def test_both_ways_of_writing(value: float | str, share: float) -> None:
    assert parse_share(value) == pytest.approx(share)


@pytest.mark.parametrize("value", ["5", "", "%", "-1%", "nan", "inf%", "a tenth"])
def test_what_is_no_share_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match=r"write 5% or 0\.05"):
        parse_share(value)
