"""Bounds of a run of a mixture of experts, from the routing that was recorded, and the distances to them.

A token needs what its routers ask for. What of it is on disk is what the cache had not: so a bound belongs to a way of
keeping experts, and to the number that the memory under the cap can hold beside everything else.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from penstock.scheduler.experts.belady import most_hits
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.events import Event, events_of
from penstock.scheduler.experts.policies import DEFAULT, policy
from penstock.scheduler.experts.replay import ReplaySetting, replay
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.tracefile import read_trace

from .moe_checkpoint import MoeShape
from .scoreboard import FRAMEWORK_NBYTES, GIB, STEADY_DISK, YARDSTICK, Attempt, t_compute_s

MIB = 2**20
GOAL_DISTANCE, GOAL_READ, GOAL_ACCELERATE, GOAL_MMAP = 1.15, 1.05, 6.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a token reads, in bytes, at least, however fast the machine: means over the tokens of the text."""

    capacity: int
    """Experts that the cap has room for, beside 0.75 GiB of framework and all other weights but the embedding."""
    cached: float
    """Missed by penstock's default policy in a cache of that size."""
    page_cache: float
    """Missed by one pool of that size that keeps what was used last, as a page cache does."""
    foreseen: float
    """Missed by Belady's MIN in such a cache: no cache of that size misses less."""
    whole_layers: float
    """Of who moves whole layers: all weights that the cap has no room for."""

    def of(self, contender: str) -> float:
        """What a contender's way of keeping weights lets it do at best."""
        if contender == "penstock":
            return self.cached
        return self.whole_layers if contender == "accelerate" else self.page_cache


def needs_of(trace: Path, shape: MoeShape, *, cap_nbytes: int, weights_nbytes: int) -> Needs:
    """From the routing of a text: a prompt, which fills the cache, and tokens one by one."""
    found = read_trace(trace)
    # A short prompt counts as decoding to a cache, but no token after it is among what is timed.
    events = [replace(event, phase="prefill") if event.step == 0 else event for event in events_of(found)]
    routing = found.header.routing
    beside = weights_nbytes - shape.experts_nbytes - shape.embedding_nbytes
    room = max(0, cap_nbytes - FRAMEWORK_NBYTES - beside)
    capacity = min(room // shape.expert_nbytes, routing.total)
    tokens = sum(event.tokens for event in events if event.layer == 0 and event.phase == "decode")
    if not tokens:
        raise ValueError(f"{trace} has no tokens after its prompt: --new-tokens must be 2 or more")
    uses = sum(len(event.experts) for event in events if event.phase == "decode")
    hits = most_hits(routing, events, capacity, bypass=True, phase="decode")
    scale = shape.expert_nbytes / tokens
    pool = CacheSetting(capacity=capacity, minimum=0.0, admission="always")
    return Needs(
        capacity=capacity,
        cached=_missed(routing, events, DEFAULT, CacheSetting(capacity=capacity)) * scale,
        page_cache=_missed(routing, events, "lru", pool) * scale,
        foreseen=(uses - hits) * scale,
        whole_layers=float(max(0, weights_nbytes - (cap_nbytes - FRAMEWORK_NBYTES))),
    )


def _missed(routing: Routing, events: Sequence[Event], name: str, setting: CacheSetting) -> int:
    done = replay(routing, events, policy(name, routing), ReplaySetting(cache=setting))
    return sum(done.decode.misses.values())


@dataclass(frozen=True, kw_only=True)
class MoeScore:
    """All rounds of one contender. Distances pair each run with the disk rate around it."""

    contender: str
    attempts: Sequence[Attempt]
    s_per_token: Sequence[float]
    """Mean over the tokens after the prompt, one per successful round."""
    read_nbytes: Sequence[float]
    """Per token, likewise."""
    missed_nbytes: Sequence[float]
    """Per token, of experts that the run's own cache had not; empty where it does not say."""
    bounds_s: Sequence[float]
    """Least seconds per token of its way of keeping weights; empty where the routing is not known."""
    bounds_own_s: Sequence[float]
    """The same of what the run's own cache missed."""
    bounds_foreseen_s: Sequence[float]
    """The same of a cache that knows the future."""
    tokens_equal: float | None
    """Share of the steps that say what the resident model says; None without it."""

    @property
    def distances(self) -> list[float]:
        """Measured over bound."""
        return [s / bound for s, bound in zip(self.s_per_token, self.bounds_s, strict=False) if bound]

    @property
    def read_over_missed(self) -> list[float]:
        """Bytes read over bytes of missed experts."""
        return [read / missed for read, missed in zip(self.read_nbytes, self.missed_nbytes, strict=False) if missed]

    def to_json(self) -> dict[str, object]:
        """Everything, with the derived figures beside the raw ones."""
        return {
            **{name: value for name, value in vars(self).items() if name != "attempts"},
            "distances": self.distances,
            "read_over_missed": self.read_over_missed,
            "attempts": [asdict(attempt) for attempt in self.attempts],
        }


def score(attempts: Sequence[Attempt], needs: Needs | None, *, expert_nbytes: int, yardstick: str) -> list[MoeScore]:
    """One score per contender, in the order in which they were first run."""
    names = list(dict.fromkeys(attempt.contender for attempt in attempts))
    compute_s = t_compute_s(attempts, 1) or 0.0
    resident = next((one.report for one in attempts if one.report and one.contender == yardstick), None)
    return [
        _score_one(
            [attempt for attempt in attempts if attempt.contender == name],
            needs if name != yardstick else None,
            compute_s=compute_s,
            expert_nbytes=expert_nbytes,
            said=resident.tokens[0] if resident and name != yardstick else None,
        )
        for name in names
    ]


def _score_one(
    own: Sequence[Attempt], needs: Needs | None, *, compute_s: float, expert_nbytes: int, said: list[int] | None
) -> MoeScore:
    good = [(attempt, attempt.report) for attempt in own if attempt.report]
    rates = [attempt.disk_nbytes_per_s for attempt, _ in good]
    missed = [
        (report.figures["misses"] + report.figures["prefetched"]) * expert_nbytes / (len(report.token_s) - 1)
        for _, report in good
        if "misses" in report.figures
    ]

    def least(nbytes: Sequence[float]) -> list[float]:
        return [max(each / rate, compute_s) for each, rate in zip(nbytes, rates, strict=False)]

    equal = None
    if said is not None and good:
        equal = min(
            sum(one == other for one, other in zip(report.tokens[0], said, strict=True)) / len(said)
            for _, report in good
        )
    return MoeScore(
        contender=own[0].contender,
        attempts=own,
        s_per_token=[report.summary()["s_per_token_mean"] for _, report in good],
        read_nbytes=[report.summary()["read_nbytes_per_token"] for _, report in good],
        missed_nbytes=missed,
        bounds_s=least([needs.of(own[0].contender)] * len(good)) if needs else [],
        bounds_own_s=least(missed),
        bounds_foreseen_s=least([needs.foreseen] * len(good)) if needs else [],
        tokens_equal=equal,
    )


def render(scores: Sequence[MoeScore], *, title: str) -> Table:
    """The table of all scores; what failed, and why, stands below it."""
    failures = [(one, attempt) for one in scores for attempt in one.attempts if attempt.failure]
    caption = "\n".join(f"{one.contender}: {attempt.failure}" for one, attempt in failures)
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    table.add_column("contender")
    for heading in (
        "s/token\nmedian", "s/token\nbest", "tokens/s", "prompt s\n(with load)", "MiB read\n/token",
        "MiB missed\n/token", "read\n/missed", "peak anon\nGiB", "disk\nGiB/s", "bound\ns/token", "distance\nmedian",
        "of own\nmisses", "of MIN", "tokens\nequal",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for one in scores:
        if one.s_per_token:
            table.add_row(*_cells(one))
        else:
            table.add_row(one.contender, one.attempts[-1].failure.partition(":")[0])
    return table


def _median(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    return f"{statistics.median(values) / scale:.{digits}f}" if values else "-"


def _cells(one: MoeScore) -> list[str]:
    good = [attempt for attempt in one.attempts if attempt.report]
    summaries = [attempt.report.summary() for attempt in good if attempt.report]
    unsteady = any(attempt.disk_change > STEADY_DISK for attempt in good)

    def over(bounds: Sequence[float]) -> str:
        return _median([s / bound for s, bound in zip(one.s_per_token, bounds, strict=False) if bound])

    return [
        one.contender,
        _median(one.s_per_token, digits=3),
        f"{min(one.s_per_token):.3f}",
        _median([1 / s for s in one.s_per_token]),
        f"{_median([s['ttft_s'] for s in summaries])} ({_median([s['ttft_with_load_s'] for s in summaries])})",
        _median(one.read_nbytes, MIB, 0),
        _median(one.missed_nbytes, MIB, 0),
        _median(one.read_over_missed, digits=3),
        f"{max(attempt.peak_anonymous_nbytes for attempt in good) / GIB:.2f}",
        _median([attempt.disk_nbytes_per_s for attempt in good], GIB) + ("~" if unsteady else ""),
        _median(one.bounds_s, digits=3),
        _median(one.distances),
        over(one.bounds_own_s),
        over(one.bounds_foreseen_s),
        "-" if one.tokens_equal is None else "yes" if one.tokens_equal == 1 else f"{one.tokens_equal:.0%}",
    ]


def summarise(scores: Sequence[MoeScore]) -> list[str]:
    """The figures that count, each with its goal."""
    by_name = {one.contender: one for one in scores if one.s_per_token}
    own = by_name.get("penstock")
    if own is None:
        return ["penstock has no result"]
    lines = []
    if own.read_over_missed:
        ratio = statistics.median(own.read_over_missed)
        lines.append(f"bytes read over bytes of missed experts: {ratio:.3f} (goal {GOAL_READ})")
    if own.distances:
        lines.append(f"distance {statistics.median(own.distances):.2f} (goal {GOAL_DISTANCE})")
    if scores and YARDSTICK not in by_name:
        lines.append(f"bounds are those of the disk alone: {YARDSTICK} was not run, and computing takes some time, too")
    figures = next(attempt.report.figures for attempt in own.attempts if attempt.report)
    if "ahead_brought" in figures:
        lines.append(f"brought ahead: {figures['ahead_brought']:.0f} experts, {figures['ahead_used']:.0f} of them used")
    else:
        lines.append("nothing was brought ahead: that takes `penstock calibrate`, and room beside the cache")
    for name, goal in (("accelerate", GOAL_ACCELERATE), ("llama.cpp", GOAL_MMAP), ("mmap", GOAL_MMAP)):
        other = by_name.get(name)
        if other is None and any(one.contender == name for one in scores):
            lines.append(f"{name} has no result: nothing is said about it (goal {goal:.0f})")
        elif other is not None:
            times = statistics.median(other.s_per_token) / statistics.median(own.s_per_token)
            bound = f", whose bound is {statistics.median(other.bounds_s):.3f} s" if other.bounds_s else ""
            lines.append(f"{times:.1f} times {name}{bound} (goal {goal:.0f})")
    return lines
