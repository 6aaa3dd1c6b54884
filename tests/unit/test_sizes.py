"""Sizes as people write them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.sizes import UNITS, format_size, parse_size


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("8GiB", 8589934592), ("1536MiB", 1610612736), ("3.5GiB", 3758096384), ("8GB", 8_000_000_000),
        ("8 GiB", 8589934592), ("1kB", 1000), ("1KiB", 1024), ("0.3B", 0), ("0B", 0), ("4096", 4096), (" 7B ", 7),
        ("1.1TB", 1_100_000_000_000), ("1PiB", 2**50), (3 * 2**30, 3221225472), (0, 0), (np.int64(5), 5),
    ],
)  # fmt: skip
def test_values(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize(
    ("size", "readings"),
    [
        ("8G", "8GiB (2^30) or 8GB (10^9)"), ("8gb", "8GiB (2^30) or 8GB (10^9)"), ("8g", "8GiB (2^30) or 8GB (10^9)"),
        ("8gib", "8GiB (2^30) or 8GB (10^9)"), ("1.5Gb", "1.5GiB (2^30) or 1.5GB (10^9)"),
        ("3.5", "3.5GiB (2^30) or 3.5GB (10^9)"), ("512M", "512MiB (2^20) or 512MB (10^6)"),
        ("4KB", "4KiB (2^10) or 4kB (10^3)"), ("4k", "4KiB (2^10) or 4kB (10^3)"), ("2T", "2TiB (2^40) or 2TB (10^12)"),
    ],
)  # fmt: skip
def test_ambiguous_sizes_suggest_both_readings(size: str, readings: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(size)
    assert readings in str(caught.value)


@pytest.mark.parametrize(
    "size",
    ["", "GiB", "-1GiB", "nan", "inf", "1e3GiB", "0x10", "8GiBs", "8 parsecs", "1_000", "\u0668GiB", "8GiB 4", ".5GiB",
     -1, True, False, 8e9, float("nan"), None, [], "99999999999TiB", 2**63],
)  # fmt: skip
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(UsageError):
        parse_size(size)  # type: ignore[arg-type]


@given(st.integers(0, 2**20), st.sampled_from(sorted(UNITS)))
def test_whole_numbers_of_a_unit_are_exact(count: int, unit: str) -> None:
    nbytes = count * UNITS[unit]
    if nbytes < 2**63:
        assert parse_size(f"{count}{unit}") == parse_size(f"{count} {unit}") == nbytes


@given(st.integers(0, 2**62))
def test_formatted_sizes_read_back_within_the_digits_shown(nbytes: int) -> None:
    unit = UNITS[format_size(nbytes).split()[1]]
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= unit * 0.005 + 1


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB"), (-(2**20), "-1.00 MiB")],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
