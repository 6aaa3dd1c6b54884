"""Tokens of a run: a draft's guesses are none."""

from __future__ import annotations

import pytest
from profiles import header, profile_of

from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.schema import NONE, Step
from penstock.runtime.profiler.tokens import tokens_made

PHASES = {"p": "prefill", "d": "decode", "v": "verify"}
STRINGS = dict(enumerate(PHASES.values()))


def steps_of(calls: str) -> list[Step]:
    """Steps of one token each, such as "1d": model 1 decodes. "-" is a step that no model began."""
    return [
        Step(
            id=number,
            phase=list(PHASES).index(call[1]),
            start=10 * number,
            end=10 * number + 10,
            tokens=1,
            module=NONE if call[0] == "-" else int(call[0]),
        )
        for number, call in enumerate(calls.split())
    ]


@pytest.mark.parametrize(
    ("calls", "made"),
    [
        ("1p 1d 1d", [1, 1, 1]),
        ("1p 1d 0p 1d 1d 0v 1d 0v", [0, 0, 1, 0, 0, 1, 0, 1]),  # 1 guesses, 0 checks
        ("2p 2d 1p 0v 2d", [1, 1, 0, 1, 1]),  # 2 generates by itself
        ("1p 1v 1v 1d", [1, 1, 1, 1]),  # guesses of a table: nobody is a draft
        ("1d 0v 0d 1v", [1, 1, 1, 1]),  # both check
        ("-d 0v -d", [1, 1, 1]),  # from a file that tells no models
        ("", []),
    ],
)
def test_guesses_are_no_tokens(calls: str, made: list[int]) -> None:
    profile = profile_of(steps_of(calls), strings=STRINGS)
    assert tokens_made(profile[Step], profile.string).tolist() == made
    assert tokens_made(profile[Step].where(slice(None, None, -1)), profile.string).tolist() == made[::-1]


def test_tokens_per_second_are_of_what_was_made() -> None:
    profile = profile_of(steps_of("1p 1d 0p 1d 1d 0v 1d 0v"), header=header(), strings=STRINGS)
    summary = summarise(profile, window=(0, 80))
    assert (summary.tokens, summary.tokens_per_s) == (3, 3 / 80e-9)
