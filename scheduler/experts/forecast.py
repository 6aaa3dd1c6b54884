"""What experts of a run will miss, before it runs: the policy of a run, replayed on the routing that is to be expected.

Of a model that has run there is a trace. Of one that has not, routing is made up by the generator's default recipe
(docs/moe.md), and the forecast says that it is assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .account import HitCause, MissCause, PhaseResult
from .cache import CacheSetting
from .costs import ExpertCosts
from .events import Event, events_of
from .generate import generate_trace
from .layerscheduler import LayerScheduler
from .policies import DEFAULT, policy
from .recipe import Recipe
from .replay import ReplaySetting, replay
from .shape import Routing
from .trace import Trace

STEPS: Final = 96
"""Steps of decoding that are replayed, where layers are few."""
LEAST_STEPS: Final = 24
EVENTS: Final = 3000
"""Layers of all steps together, about: a replay takes some tenths of a millisecond for each."""
PROMPT: Final = 64
"""Tokens of a made-up prompt, at most."""
NEVER_S: Final = 1e6
"""Of an expert on a processor that must not compute it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertForecast:
    """Of one step that continues every sequence by a token, the mean; and of the prompt before it."""

    source: str
    """Where the routing is from, for people."""
    assumed: bool
    """Whether it was made up."""
    uses: float
    hits: Mapping[HitCause, float]
    misses: Mapping[MissCause, float]
    read_nbytes: float
    """From disk."""
    copied_nbytes: float
    """Over the link to a device apart."""
    computed_by_cpu: float
    """Uses, beside a device apart."""
    waiting_s: float
    """What expert layers take beyond computing all their experts where they are computed fastest."""
    prompt_waiting_s: float
    """The same of the prompt."""

    @property
    def missed(self) -> float:
        """Uses whose expert is not where it is computed fastest."""
        return sum(self.misses.values())

    @property
    def hit_rate(self) -> float:
        """Share of uses; 0 where there are none."""
        return 1 - self.missed / self.uses if self.uses else 0.0


def expected_trace(routing: Routing, *, batch: int = 1, prompt: int = PROMPT) -> Trace:
    """Made-up routing of a model that has not run: prompts of a batch, and steps that continue them.

    Args:
        routing: The model's.
        batch: Sequences that are continued together.
        prompt: Tokens of each prompt; longer ones are cut, as they use no more experts worth mentioning.
    """
    steps = max(LEAST_STEPS, min(STEPS, EVENTS // routing.layers))
    length = max(1, min(prompt, PROMPT))
    return generate_trace(Recipe(routing=routing, requests=batch, batch=batch, prompt=length, generate=steps))


def decoded_together(trace: Trace) -> int:
    """Sequences that a trace continues at a time, in most of its steps; 0 where it continues none."""
    top_k = trace.header.routing.top_k
    counts = Counter(
        round(float(event.rows.sum()) / top_k)
        for event in events_of(trace)
        if event.phase == "decode" and event.layer == 0
    )
    return counts.most_common(1)[0][0] if counts else 0


def foresee_experts(
    trace: Trace,
    *,
    assumed: bool,
    capacity: int,
    host: int | None,
    read_nbytes: int,
    copied_nbytes: int,
    costs: ExpertCosts | None,
    apart: bool = False,
    exact: bool = False,
) -> ExpertForecast:
    """Replay what a run would do.

    Args:
        trace: What its routers will ask for, or something like it.
        assumed: Whether that was made up.
        capacity: Experts that the tier that computes keeps.
        host: Experts that host memory keeps below a device apart; None for all.
        read_nbytes: Of an expert from disk.
        copied_nbytes: Of an expert to a device apart.
        costs: Of this machine; without them there are no seconds, and nothing is computed by the CPU beside a device.
        apart: Whether what computes has memory of its own.
        exact: Whether one processor computes everything.
    """
    events, routing = events_of(trace), trace.header.routing
    assert costs is None or costs.separate is apart, "costs of another machine"
    if costs is not None and costs.separate and exact:
        costs = replace(costs, cpu_s=lambda rows: NEVER_S)
    done = replay(
        routing,
        events,
        policy(DEFAULT, routing),
        # what the CPU has computed is not brought afterwards in a run
        ReplaySetting(cache=CacheSetting(capacity=capacity), host=host if apart else None, fill=False),
        scheduler=None if costs is None else LayerScheduler(costs),
        expert_nbytes=1,
    )
    decode = done.decode
    steps = max(sum(event.phase == "decode" and event.layer == 0 for event in events), 1)
    prompts = max(sum(event.phase == "prefill" and event.layer == 0 for event in events), 1)
    reads, copies = _moved(decode, apart=apart, host_has_all=host is None, timed=costs is not None)
    return ExpertForecast(
        source=trace.header.source,
        assumed=assumed,
        uses=decode.uses / steps,
        hits={cause: count / steps for cause, count in decode.hits.items()},
        misses={cause: count / steps for cause, count in decode.misses.items()},
        read_nbytes=reads * read_nbytes / steps,
        copied_nbytes=copies * copied_nbytes / steps,
        computed_by_cpu=decode.computed_by_cpu / steps if apart else 0.0,
        waiting_s=max(decode.seconds - _computing_s(events, costs, "decode"), 0.0) / steps,
        prompt_waiting_s=max(done.prefill.seconds - _computing_s(events, costs, "prefill"), 0.0) / prompts,
    )


def _moved(decode: PhaseResult, *, apart: bool, host_has_all: bool, timed: bool) -> tuple[int, int]:
    """Experts read from disk, and copied to a device apart."""
    if timed:
        return decode.read_nbytes, decode.copied_nbytes if apart else 0
    # Without costs every miss is one move to where it is computed. What host memory has of them is not replayed then:
    # all are from disk, at the most.
    reads = 0 if apart and host_has_all else decode.copied_nbytes
    return reads, decode.copied_nbytes if apart else 0


def _computing_s(events: Sequence[Event], costs: ExpertCosts | None, phase: str) -> float:
    """What all experts take where they are computed fastest, one after another, if nothing is waited for."""
    if costs is None:
        return 0.0
    seconds = costs.device_s or costs.cpu_s
    return sum(seconds(rows) for event in events if event.phase == phase for rows in event.rows.tolist())
