"""What one layer does in one step, as policies see it: which experts, for how many tokens, and what the gate said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .trace import FloatArray, IntArray, Phase, Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Event:
    """One layer in one step. All its experts are needed at once, and each for all its tokens at once."""

    step: int
    layer: int
    phase: Phase
    tokens: int
    experts: IntArray
    """Those that are needed, ascending, each once."""
    rows: IntArray
    """Tokens that use each of them."""
    candidates: IntArray
    """Experts that the gate gave a score, ascending: those that are needed and others that came near."""
    scores: FloatArray
    """Of the candidates, the mean over the tokens; without scores in the trace, the share of a token's choices that an
    expert got."""
    guesses: IntArray | None = None
    """What the gate of the next layer says of this layer's hidden state, ascending; None where nobody asked it."""
    guessed_rows: IntArray | None = None
    """Tokens for which it says so."""
    guess_ranks: IntArray | None = None
    """How high each of them stood, at best: 0 is what the gate gave a token the highest logit."""


def event_of(
    *,
    step: int,
    layer: int,
    phase: Phase,
    experts: int,
    chosen: Any,
    candidates: Any = None,
    scores: Any = None,
    guesses: Any = None,
) -> Event:
    """One layer in one step, from what its gate said.

    Args:
        step: Number of the step.
        layer: Number of the layer.
        phase: What the step is.
        experts: Of a layer.
        chosen: [T, K] experts by token.
        candidates: [T, W] experts that have a score; `chosen` if there are none.
        scores: [T, W] of the candidates.
        guesses: [T, K] experts that the next layer would choose, the likeliest first; the number of experts stands for
            none.
    """
    tokens = len(chosen)
    rows = np.bincount(chosen.ravel(), minlength=experts)
    needed = np.flatnonzero(rows)
    if scores is None:
        near, mean = needed, rows[needed] / chosen.size
    else:
        sums = np.bincount(candidates.ravel(), weights=scores.ravel().astype(np.float64), minlength=experts)
        near = np.unique(candidates).astype(np.int64)
        mean = sums[near] / tokens
    event = Event(
        step=step,
        layer=layer,
        phase=phase,
        tokens=tokens,
        experts=needed,
        rows=rows[needed],
        candidates=near,
        scores=mean,
    )
    return event if guesses is None else with_guesses(event, guesses, experts)


def with_guesses(event: Event, guesses: Any, experts: int) -> Event:
    """The same, knowing what the gate of the next layer says of these tokens.

    Args:
        event: One layer in one step.
        guesses: [T, K] experts that the next layer would choose, the likeliest first; the number of experts stands for
            none.
        experts: Of a layer.
    """
    rows = np.bincount(guesses.ravel(), minlength=experts + 1)[:experts]
    ahead = np.flatnonzero(rows)
    return replace(event, guesses=ahead, guessed_rows=rows[ahead], guess_ranks=_ranks(guesses, experts)[ahead])


def _ranks(guesses: Any, experts: int) -> IntArray:
    """[E + 1] The first column of [T, K] guesses in which each expert stands."""
    found = np.full(experts + 1, guesses.shape[1], np.int64)
    for column in reversed(range(guesses.shape[1])):
        found[guesses[:, column]] = column
    return found


def merged(events: Sequence[Event]) -> Event:
    """One event of several micro-batches that pass a layer in one sweep: each expert is then needed once for all.

    Guesses are left out: whoever computes for all asks for those of all (`with_guesses`).
    """
    first, tokens = events[0], sum(event.tokens for event in events)
    if any(event.layer != first.layer for event in events):
        raise ValueError("only micro-batches of one layer are one event")
    experts = np.unique(np.concatenate([event.experts for event in events]))
    near = np.unique(np.concatenate([event.candidates for event in events]))
    rows = np.zeros(len(experts), np.int64)
    scores = np.zeros(len(near))
    for event in events:
        rows[np.searchsorted(experts, event.experts)] += event.rows
        scores[np.searchsorted(near, event.candidates)] += event.scores * event.tokens / tokens
    return Event(
        step=first.step,
        layer=first.layer,
        phase="prefill" if any(event.phase == "prefill" for event in events) else "decode",
        tokens=tokens,
        experts=experts,
        rows=rows,
        candidates=near,
        scores=scores,
    )


def events_of(trace: Trace) -> list[Event]:
    """All events of a trace, in the order in which they happened."""
    routing = trace.header.routing
    found = []
    for step in range(trace.steps):
        at = slice(int(trace.begins[step]), int(trace.begins[step + 1]))
        for layer in range(routing.layers):
            candidates = trace.experts[layer, at]
            last = layer + 1 == routing.layers
            found.append(
                event_of(
                    step=step,
                    layer=layer,
                    phase=trace.phase(step),
                    experts=routing.experts,
                    chosen=candidates[:, : routing.top_k],
                    candidates=candidates,
                    scores=None if trace.scores is None else trace.scores[layer, at],
                    guesses=None if trace.guesses is None or last else trace.guesses[layer + 1, at],
                )
            )
    return found
