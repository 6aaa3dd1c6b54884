"""Made-up routing: that of its recipe, every time, with the properties that its parameters are said to have."""

from __future__ import annotations

import numpy as np
import pytest
from moe_traces import recipe

from penstock.memory.errors import UsageError
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.trace import Trace


def decoded(trace: Trace) -> np.ndarray:
    """[L, T, K] The choices of tokens that were generated, of all sequences."""
    tokens = np.repeat(trace.phases, np.diff(trace.begins)) == 1
    return trace.experts[:, tokens, : trace.header.routing.top_k]


def reuse(trace: Trace) -> float:
    """The share of a token's experts that the one before it used."""
    chosen = decoded(trace)
    again = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).any(axis=3)
    return float(again.mean())


def skew(trace: Trace) -> float:
    """The share of uses that the most used eighth of the experts has, on average over layers."""
    counts = [np.sort(np.bincount(layer.ravel(), minlength=16))[::-1] for layer in decoded(trace)]
    return float(np.mean([count[:2].sum() / count.sum() for count in counts]))


def test_a_recipe_makes_the_same_trace_every_time_and_another_seed_another() -> None:
    one, again, other = (generate_trace(recipe(seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(one.experts, again.experts)
    assert not np.array_equal(one.experts, other.experts)


def test_more_layers_leave_the_first_ones_as_they_are() -> None:
    small = generate_trace(recipe())
    large = generate_trace(recipe(routing=Routing(layers=5, experts=16, top_k=2)))
    assert np.array_equal(large.experts[:3], small.experts)


def test_steps_are_prompts_and_then_tokens_of_all_sequences_of_a_group() -> None:
    trace = generate_trace(recipe(requests=5, batch=2, prompt=3, generate=2))
    assert [trace.phase(step) for step in range(trace.steps)] == ["prefill", "decode", "decode"] * 3
    assert np.diff(trace.begins).tolist() == [6, 2, 2, 6, 2, 2, 3, 1, 1]
    assert trace.requests[:10].tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    assert trace.requests[-5:].tolist() == [4] * 5
    bare = generate_trace(recipe(requests=1, prompt=0, generate=2))
    assert [bare.phase(step) for step in range(bare.steps)] == ["decode"] * 2


def test_what_each_parameter_does() -> None:
    nothing = {"zipf": 0.0, "topic": 0.0, "context": 0.0, "token": 1.0, "vocabulary": 100_000, "vocabulary_zipf": 0.0}
    plain = generate_trace(recipe(generate=400, **nothing))
    assert reuse(plain) == pytest.approx(2 / 16, abs=0.03), "nothing connects two tokens"
    skewed = generate_trace(recipe(generate=400, **{**nothing, "zipf": 2.0}))
    assert skew(skewed) > skew(plain) + 0.2
    drifting = generate_trace(recipe(generate=400, **{**nothing, "context": 2.0}))
    jumping = generate_trace(recipe(generate=400, **{**nothing, "context": 2.0, "persistence": 0.0}))
    assert reuse(drifting) > reuse(jumping) + 0.2
    assert reuse(jumping) == pytest.approx(2 / 16, abs=0.03)
    words = generate_trace(recipe(generate=400, **{**nothing, "vocabulary": 2}))
    assert reuse(words) > 0.4, "every second word is the one before"


def test_scores_are_shares_and_the_best_come_first() -> None:
    trace = generate_trace(recipe())
    assert trace.scores is not None
    assert np.all(np.diff(trace.scores.astype(np.float32), axis=2) <= 0)
    assert np.all(trace.scores.sum(axis=2, dtype=np.float32) <= 1.01)
    every = generate_trace(recipe(runners_up=14))
    assert every.scores is not None
    assert np.allclose(every.scores.sum(axis=2, dtype=np.float32), 1, atol=0.01)


def test_guesses_are_right_without_noise_and_mostly_wrong_with_much() -> None:
    def right(noise: float) -> float:
        trace = generate_trace(recipe(guess_noise=noise))
        assert trace.guesses is not None
        assert np.all(trace.guesses[0] == 16), "nothing is above the first layer"
        chosen = trace.experts[1:, :, :2]
        return float((trace.guesses[1:, :, :, None] == chosen[:, :, None, :]).any(axis=3).mean())

    assert right(0.0) == 1.0
    assert 0.5 < right(0.5) < 0.95
    assert right(50.0) < 0.3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"zipf": -1.0}, "zipf is -1: it must be between 0 and 10"),
        ({"persistence": 1.0}, "persistence is 1"),
        ({"prompt": 0, "generate": 0}, "one of the two must be 1 or more"),
        ({"requests": 10**6, "generate": 10**5}, "ask for fewer requests"),
        ({"runners_up": 15}, "runners-up is 15: it must be between -1 and 14"),
    ],
)
def test_what_cannot_be_made_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        recipe(**changes)


def test_the_largest_and_the_smallest_gates() -> None:
    all_of_them = generate_trace(recipe(routing=Routing(layers=1, experts=4, top_k=4)))
    assert np.all(np.sort(all_of_them.experts[..., :4], axis=2) == np.arange(4))
    many = generate_trace(recipe(routing=Routing(layers=1, experts=512, top_k=10)))
    assert many.experts.max() > 255
