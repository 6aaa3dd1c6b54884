"""A routing trace: which experts each token chose in each layer, in the order in which layers ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ...memory.errors import TraceError
from .shape import ExpertShape, Routing

Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")
"""As they are numbered in a trace."""

Ids = npt.NDArray[np.uint16]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace is of."""

    routing: Routing
    width: int
    """Candidates that are kept of each token: those that it chose, and others that came near."""
    source: str
    """Where it is from, for people: a model and a text, or the parameters of a generator."""
    scored: bool = False
    """Whether candidates have the scores that the gate gave them."""
    guessed: bool = False
    """Whether there is what each layer's gate would have said one layer earlier."""
    expert: ExpertShape | None = None
    """Sizes of an expert, where they are known: without them there are hit rates but no seconds."""
    paths: tuple[str, ...] = ()
    """Names of the layers' modules, where it is of a model."""

    def __post_init__(self) -> None:
        routing = self.routing
        if not routing.top_k <= self.width <= routing.experts:
            raise TraceError(
                f"a trace keeps {self.width} candidates of {routing.experts} experts: between {routing.top_k}, which a "
                "token uses, and all of them are possible"
            )
        if self.paths and len(self.paths) != routing.layers:
            raise TraceError(f"a trace names {len(self.paths)} layers and has {routing.layers}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """All steps of a recording. A step is one pass over the model: a prompt, or one token of every sequence.

    L layers, T tokens of all steps together, S steps, W candidates, K experts that a token uses.
    """

    header: TraceHeader
    phases: npt.NDArray[np.uint8]
    """[S] An index into PHASES."""
    begins: IntArray
    """[S + 1] The first token of each step, and T."""
    requests: npt.NDArray[np.uint32]
    """[T] The sequence that a token belongs to."""
    experts: Ids
    """[L, T, W] Candidates. The first K are those that the token chose."""
    scores: npt.NDArray[np.float16] | None
    """[L, T, W] What the gate gave them."""
    guesses: Ids | None
    """[L, T, K] What the gate of this layer says of the hidden state before the layer above it; the number of experts
    stands for none (in the first layer there is nothing above)."""
    problems: tuple[str, ...] = ()
    """What a reader of figures must know: an end that was cut off."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.phases)

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return len(self.requests)

    def phase(self, step: int) -> Phase:
        """What a step is."""
        return PHASES[int(self.phases[step])]

    def between(self, first: int, last: int) -> Trace:
        """The steps from `first` to before `last`."""
        low, high = int(self.begins[first]), int(self.begins[last])
        return Trace(
            header=self.header,
            phases=self.phases[first:last],
            begins=self.begins[first : last + 1] - low,
            requests=self.requests[low:high],
            experts=self.experts[:, low:high],
            scores=None if self.scores is None else self.scores[:, low:high],
            guesses=None if self.guesses is None else self.guesses[:, low:high],
            problems=self.problems,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One step, as a recording hands it over."""

    phase: Phase
    requests: npt.NDArray[np.uint32]
    """[T] The sequence that a token belongs to."""
    experts: Ids
    """[L, T, W] as of a trace; so are the others."""
    scores: npt.NDArray[np.float16] | None = None
    guesses: Ids | None = None


def trace_of(header: TraceHeader, steps: Iterable[Step], *, problems: tuple[str, ...] = ()) -> Trace:
    """One trace of all steps.

    Raises:
        TraceError: a step is not what the header says.
    """
    found = list(steps)
    routing = header.routing
    layers, k = routing.layers, routing.top_k
    lengths = [len(step.requests) for step in found]
    for number, step in enumerate(found):
        wanted = (layers, lengths[number], header.width)
        if step.experts.shape != wanted:
            raise TraceError(f"step {number} has experts of shape {step.experts.shape}: {wanted} is needed")
        if (step.scores is not None) != header.scored or (step.guesses is not None) != header.guessed:
            raise TraceError(f"step {number} has or lacks scores or guesses against what the trace says of itself")
    return Trace(
        header=header,
        phases=np.array([PHASES.index(step.phase) for step in found], np.uint8),
        begins=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        requests=_joined([step.requests for step in found], (0,), np.uint32, axis=0),
        experts=_joined([step.experts for step in found], (layers, 0, header.width), np.uint16, axis=1),
        scores=_joined([s.scores for s in found], (layers, 0, header.width), np.float16, axis=1)
        if header.scored
        else None,
        guesses=_joined([s.guesses for s in found], (layers, 0, k), np.uint16, axis=1) if header.guessed else None,
        problems=problems,
    )


def steps_of(trace: Trace) -> Iterator[Step]:
    """The steps of a trace, in order: what `trace_of` makes it of."""
    for number in range(trace.steps):
        at = slice(int(trace.begins[number]), int(trace.begins[number + 1]))
        yield Step(
            phase=trace.phase(number),
            requests=trace.requests[at],
            experts=trace.experts[:, at],
            scores=None if trace.scores is None else trace.scores[:, at],
            guesses=None if trace.guesses is None else trace.guesses[:, at],
        )


def _joined(parts: list[Any], empty: tuple[int, ...], dtype: Any, *, axis: int) -> Any:
    return np.concatenate([np.empty(empty, dtype), *parts], axis=axis).astype(dtype, copy=False)


def _check(trace: Trace) -> None:
    routing, width = trace.header.routing, trace.header.width
    steps, tokens = trace.steps, trace.tokens
    shapes: list[tuple[str, npt.NDArray[Any], tuple[int, ...]]] = [
        ("experts", trace.experts, (routing.layers, tokens, width))
    ]
    if trace.scores is not None:
        shapes.append(("scores", trace.scores, (routing.layers, tokens, width)))
    if trace.guesses is not None:
        shapes.append(("guesses", trace.guesses, (routing.layers, tokens, routing.top_k)))
    for name, array, wanted in shapes:
        if array.shape != wanted:
            raise TraceError(f"the trace's {name} have the shape {array.shape}: {wanted} is needed")
    if (trace.scores is not None) != trace.header.scored or (trace.guesses is not None) != trace.header.guessed:
        raise TraceError("the trace has or lacks scores or guesses against what its header says")
    if len(trace.begins) != steps + 1 or int(trace.begins[0]) != 0 or int(trace.begins[-1]) != tokens:
        raise TraceError(f"the trace has {steps} steps and {tokens} tokens, and beginnings of steps that do not agree")
    if np.any(np.diff(trace.begins) < 1):
        raise TraceError("the trace has a step without tokens")
    if np.any(trace.phases >= len(PHASES)):
        raise TraceError(f"the trace has a step of phase {int(trace.phases.max())}: there are {', '.join(PHASES)}")
    if tokens == 0:
        return
    if int(trace.experts.max()) >= routing.experts:
        raise TraceError(f"the trace names expert {int(trace.experts.max())}: there are {routing.experts} in a layer")
    for layer in trace.experts:  # layer by layer: sorting all of a long trace would take as much memory again
        ordered = np.sort(layer, axis=1)
        if np.any(ordered[:, 1:] == ordered[:, :-1]):
            raise TraceError("the trace has a token that names one expert twice in a layer")
    if trace.scores is not None and not np.all(np.isfinite(trace.scores)):
        raise TraceError("the trace has scores that are no numbers")
    if trace.guesses is not None and int(trace.guesses.max()) > routing.experts:
        raise TraceError(f"the trace guesses expert {int(trace.guesses.max())}: there are {routing.experts} in a layer")
