"""What a simulation says: times, rates and what binds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from ..schedule import TaskGraph
from ..work import Work

_ALL = 12
_SOME = 6
"""Of a longer chain so many layers are simulated, and the rest is as the last of these."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass, or one step: how long it takes, and for how long each resource works."""

    seconds: float
    busy: dict[str, float]

    def times(self, count: float) -> Pass:
        """So many of them, one after the other."""
        return Pass(seconds=self.seconds * count, busy={name: each * count for name, each in self.busy.items()})

    @staticmethod
    def chain(passes: Iterable[Pass]) -> Pass:
        """One after the other."""
        seconds, busy = 0.0, dict[str, float]()
        for each in passes:
            seconds += each.seconds
            for name, worked in each.busy.items():
                busy[name] = busy.get(name, 0.0) + worked
        return Pass(seconds=seconds, busy=busy)

    @staticmethod
    def serial(**parts: float) -> Pass:
        """What happens one after the other, by resource."""
        return Pass(seconds=sum(parts.values()), busy=parts)


def repeated(depth: int, build: Callable[[int], TaskGraph]) -> Pass:
    """A pass through `depth` layers that are alike, of which `build` makes the graph.

    A schedule of equal layers is periodic after its first few: what one layer adds is taken from there.
    """
    if depth <= _ALL:
        return _run(build(depth))
    short, longer = _run(build(_SOME)), _run(build(_ALL))
    left = (depth - _ALL) / (_ALL - _SOME)
    return Pass(
        seconds=longer.seconds + left * (longer.seconds - short.seconds),
        busy={name: each + left * (each - short.busy.get(name, 0.0)) for name, each in longer.busy.items()},
    )


def _run(graph: TaskGraph) -> Pass:
    schedule = graph.simulate()
    return Pass(seconds=schedule.makespan, busy=schedule.busy)


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What one system would take for a workload on a machine. Times in seconds."""

    system: str
    kind: str
    tokens_per_s: float
    """Generated tokens over prefill and decode together; in training, tokens that pass through the model."""
    step_s: float
    """One decode step of the whole batch, halfway through the answer; in training, one step of the optimizer."""
    prefill_s: float = 0.0
    """Until the first token of every sequence."""
    decode_tokens_per_s: float = 0.0
    """Generated tokens after the first one, over the time that these took."""
    tflops: float | None = None
    """Training: operations per second and device, with those that recompute activations where the system does."""
    busy: dict[str, float] = {}
    """By resource: seconds of work in the whole run, or in one training step."""
    binds: str = ""
    """The resource that works longest."""
    notes: tuple[str, ...] = ()


def generated(
    system: str, work: Work, prefill: Pass, decode: Pass, notes: Iterable[str] = (), *, sequences: int | None = None
) -> Prediction:
    """A prediction from one prefill and one decode step; `sequences` where it is not the batch that takes part."""
    batch = sequences or work.batch
    steps = work.generate - 1
    decode_s = steps * decode.seconds
    whole = Pass.chain((prefill, decode.times(steps)))
    return Prediction(
        system=system,
        kind=work.kind,
        tokens_per_s=batch * work.generate / whole.seconds,
        step_s=decode.seconds,
        prefill_s=prefill.seconds,
        decode_tokens_per_s=batch * steps / decode_s if decode_s else 0.0,
        busy={name: seconds for name, seconds in whole.busy.items() if seconds > 0},
        binds=max(whole.busy, key=lambda name: whole.busy[name], default=""),
        notes=tuple(notes),
    )


def trained(system: str, work: Work, step: Pass, operations: float, devices: int, notes: Iterable[str]) -> Prediction:
    """A prediction from one step of training; `operations` of all devices together."""
    return Prediction(
        system=system,
        kind=work.kind,
        tokens_per_s=work.tokens / step.seconds,
        step_s=step.seconds,
        tflops=operations / step.seconds / devices / 1e12,
        busy={name: seconds for name, seconds in step.busy.items() if seconds > 0},
        binds=max(step.busy, key=lambda name: step.busy[name], default=""),
        notes=tuple(notes),
    )
