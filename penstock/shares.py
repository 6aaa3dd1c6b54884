"""Shares as people write them: "5%" or 0.05; "5" is an error that suggests both."""

from __future__ import annotations

import math

from .memory.errors import UsageError


def parse_share(value: float | str) -> float:
    """A share of 1: from a number of at most 1, or from text that is such a number or a percentage ("150%").

    Raises:
        UsageError: it is not a number, negative, or more than 1 without a per cent sign.
    """
    text = str(value).strip()
    percent = text.endswith("%")
    try:
        number = float(text[:-1] if percent else text)
    except ValueError as error:
        raise UsageError(f"{text!r} is not a share: write 5% or 0.05") from error
    if not math.isfinite(number) or number < 0:
        raise UsageError(f"{text!r} is not a share: write 5% or 0.05")
    if percent:
        return number / 100
    if number > 1:
        raise UsageError(f"{text!r} is ambiguous: write {number:g}% or {number / 100:g}")
    return number
