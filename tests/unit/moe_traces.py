"""Small traces and costs for tests of experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.scheduler.experts.costs import ExpertCosts
from penstock.scheduler.experts.events import Event, event_of
from penstock.scheduler.experts.recipe import Recipe
from penstock.scheduler.experts.shape import ExpertShape, Routing
from penstock.scheduler.experts.timelines import ExpertTask
from penstock.scheduler.experts.trace import Phase, Step, Trace, TraceHeader, trace_of
from penstock.scheduler.hardware import Sharing

EXPERT = ExpertShape(hidden=64, ffn=32)


def recipe(**changes: object) -> Recipe:
    routing = Routing(layers=3, experts=16, top_k=2)
    made: dict[str, object] = {"routing": routing, "expert": EXPERT, "requests": 2, "prompt": 12, "generate": 40}
    return Recipe(**{**made, **changes})  # type: ignore[arg-type]


def event(layer: int, *experts: int, step: int = 0, phase: Phase = "decode", of: int = 16) -> Event:
    """One token's experts."""
    return event_of(step=step, layer=layer, phase=phase, experts=of, chosen=np.array([experts]))


def plain_trace(choices: Sequence[Sequence[Sequence[int]]], *, experts: int = 16, phase: Phase = "decode") -> Trace:
    """A step for each token: its experts by layer."""
    layers, k = len(choices[0]), len(choices[0][0])
    header = TraceHeader(routing=Routing(layers=layers, experts=experts, top_k=k), width=k, source="by hand")
    return trace_of(
        header,
        [
            Step(
                phase=phase,
                requests=np.zeros(1, np.uint32),
                experts=np.array(token, np.uint16).reshape(layers, 1, k),
            )
            for token in choices
        ],
    )


def costs(
    *,
    copy_s: float = 4.0,
    read_s: float = 10.0,
    cpu: tuple[float, float] = (2.0, 1.0),
    device: tuple[float, float] | None = (1.0, 0.1),
    cpu_start_s: float = 0.0,
    sharing: Sharing | None = None,
) -> ExpertCosts:
    """Seconds that are round numbers: so much per expert, and so much per row of it."""
    return ExpertCosts(
        cpu_s=lambda rows: cpu[0] + cpu[1] * rows,
        device_s=None if device is None else lambda rows: device[0] + device[1] * rows,
        copy_s=copy_s,
        read_s=read_s,
        cpu_start_s=cpu_start_s,
        sharing=sharing or Sharing(),
    )


def task(expert: int, rows: int = 1, *, device: bool = False, host: bool = True) -> ExpertTask:
    return ExpertTask(expert=expert, rows=rows, on_device=device, on_host=host)
