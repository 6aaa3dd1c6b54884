"""From what was measured to what is shown: the machine's bound, distances, and the table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table

from .cgroup import CgroupUsage
from .contenders.protocol import Report

GIB = 2**30
FRAMEWORK_NBYTES = int(0.75 * GIB)
"""What interpreter, torch and transformers take of the cap; the rest can hold weights."""
STEADY_DISK = 0.15
"""Largest relative difference of the raw disk rate before and after a run that counts as a steady disk."""
YARDSTICK = "transformers"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One run of one contender in one round, or why there was none."""

    contender: str
    batch: int
    round_number: int
    report: Report | None = None
    failure: str = ""
    """In the form "what: why"; the table shows what, and the line below it why."""
    not_installed: bool = False
    capped: bool = True
    """False for the yardstick, which runs without a cgroup."""
    usage: CgroupUsage | None = None
    peak_anonymous_nbytes: int = 0
    disk_before_nbytes_per_s: float = 0.0
    disk_after_nbytes_per_s: float = 0.0
    repeat_count: int = 0
    """How often the run was repeated because the disk changed its pace meanwhile."""

    @property
    def disk_nbytes_per_s(self) -> float:
        """The better of the two rates: the strictest bound."""
        return max(self.disk_before_nbytes_per_s, self.disk_after_nbytes_per_s)

    @property
    def disk_change(self) -> float:
        """How far the two rates lie apart, relative to the better one."""
        if not self.disk_nbytes_per_s:
            return 0.0
        return abs(self.disk_before_nbytes_per_s - self.disk_after_nbytes_per_s) / self.disk_nbytes_per_s


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What no runtime can beat on this machine under this cap (the machine's bound, not a plan's)."""

    weights_nbytes: int
    cap_nbytes: int
    t_compute_s: float | None
    """Seconds per token of the resident model; None when the yardstick was not run."""

    @property
    def disk_fraction(self) -> float:
        """The share d of the weights that must come from the disk in every sweep."""
        return max(0.0, 1 - (self.cap_nbytes - FRAMEWORK_NBYTES) / self.weights_nbytes)

    def s_per_token(self, disk_nbytes_per_s: float) -> float:
        """max(d W / B_disk, t_compute), without t_compute where it is unknown."""
        return max(self.disk_fraction * self.weights_nbytes / disk_nbytes_per_s, self.t_compute_s or 0.0)


@dataclass(frozen=True, kw_only=True)
class Score:
    """All rounds of one contender at one batch size. Distances pair each run with the disk rate around it."""

    contender: str
    batch: int
    attempts: Sequence[Attempt]
    s_per_token: Sequence[float]
    """Mean seconds per decoded token, one per successful round."""
    bounds_s: Sequence[float]
    """One per successful round; empty for the yardstick."""
    tokens_equal: bool | None
    """Against the yardstick's tokens of the same batch; None when there is nothing to compare with."""
    equal_token_share: float | None
    """Equal tokens up to each row's first difference, over all tokens."""

    @property
    def distances(self) -> list[float]:
        """Measured over bound, one per successful round."""
        return [measured / bound for measured, bound in zip(self.s_per_token, self.bounds_s, strict=False) if bound]

    def to_json(self) -> dict[str, object]:
        """Everything, with the derived figures beside the raw ones."""
        return {
            **{name: value for name, value in vars(self).items() if name != "attempts"},
            "distances": self.distances,
            "attempts": [
                {**asdict(attempt), "summary": attempt.report.summary() if attempt.report else None}
                for attempt in self.attempts
            ],
        }


def t_compute_s(attempts: Sequence[Attempt], batch: int) -> float | None:
    """The best median seconds per token of the resident model at this batch size."""
    medians = [
        attempt.report.summary()["s_per_token_median"]
        for attempt in attempts
        if attempt.report and attempt.contender == YARDSTICK and attempt.batch == batch
    ]
    return min(medians, default=None)


def score(attempts: Sequence[Attempt], *, weights_nbytes: int, cap_nbytes: int) -> list[Score]:
    """One score per contender and batch size, in the order in which they were first run."""
    keys = list(dict.fromkeys((attempt.batch, attempt.contender) for attempt in attempts))
    return [_score_one(attempts, contender, batch, weights_nbytes, cap_nbytes) for batch, contender in keys]


def _score_one(attempts: Sequence[Attempt], contender: str, batch: int, weights_nbytes: int, cap_nbytes: int) -> Score:
    own = [attempt for attempt in attempts if (attempt.contender, attempt.batch) == (contender, batch)]
    good = [(attempt, attempt.report) for attempt in own if attempt.report]
    bound = Bound(weights_nbytes=weights_nbytes, cap_nbytes=cap_nbytes, t_compute_s=t_compute_s(attempts, batch))
    share = _equal_token_share([report for _, report in good], _yardstick_tokens(attempts, batch))
    return Score(
        contender=contender,
        batch=batch,
        attempts=own,
        s_per_token=[report.summary()["s_per_token_mean"] for _, report in good],
        bounds_s=[bound.s_per_token(attempt.disk_nbytes_per_s) for attempt, _ in good if attempt.capped],
        tokens_equal=None if share is None else share == 1.0,
        equal_token_share=share,
    )


def _yardstick_tokens(attempts: Sequence[Attempt], batch: int) -> list[list[int]] | None:
    for attempt in attempts:
        if attempt.report and attempt.contender == YARDSTICK and attempt.batch == batch:
            return attempt.report.tokens
    return None


def _equal_token_share(reports: Sequence[Report], expected: list[list[int]] | None) -> float | None:
    """Tokens before each row's first difference (what follows one is another text), over all; the worst round."""
    if expected is None or not reports:
        return None
    total = sum(len(row) for row in expected)
    shares = []
    for report in reports:
        equal = 0
        for row, expected_row in zip(report.tokens, expected, strict=True):
            matches = [token == wanted for token, wanted in zip(row, expected_row, strict=True)]
            equal += matches.index(False) if False in matches else len(matches)
        shares.append(equal / total)
    return min(shares)


def render(scores: Sequence[Score], *, title: str) -> Table:
    """The table of all scores; what failed, and why, stands below it."""
    failures = [(one, attempt) for one in scores for attempt in one.attempts if attempt.failure]
    caption = "\n".join(f"{one.contender}, batch {one.batch}: {attempt.failure}" for one, attempt in failures)
    table = Table(title=title, title_justify="left", caption=escape(caption) or None, caption_justify="left")
    table.add_column("contender")
    for heading in (
        "batch", "s/token\nmedian", "s/token\nbest", "TTFT s\n(with load)", "GiB read\n/token", "peak anon\nGiB",
        "peak cgroup\nGiB", "OOM\nkills", "disk\nGiB/s", "bound\ns/token", "distance\nmedian", "distance\nbest",
        "tokens\nequal",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for one in scores:
        if one.s_per_token:
            table.add_row(*_cells(one))
        else:
            last = one.attempts[-1]
            kills = str(last.usage.oom_kill_count) if last.usage else "-"
            table.add_row(one.contender, str(one.batch), last.failure.partition(":")[0], *["-"] * 5, kills)
    return table


def _cells(one: Score) -> list[str]:
    good = [attempt for attempt in one.attempts if attempt.report]
    summaries = [attempt.report.summary() for attempt in good if attempt.report]

    def median(values: Sequence[float], scale: float = 1.0) -> str:
        return f"{statistics.median(values) / scale:.2f}" if values else "-"

    def column(name: str) -> list[float]:
        return [summary[name] for summary in summaries]

    def worst(what: Callable[[CgroupUsage], int | None]) -> int | None:
        values = [what(attempt.usage) for attempt in one.attempts if attempt.usage]
        return max((value for value in values if value is not None), default=None)

    peak_nbytes = worst(lambda usage: usage.peak_nbytes)
    kills = worst(lambda usage: usage.oom_kill_count)
    unsteady = any(attempt.disk_change > STEADY_DISK for attempt in good)
    equal = "-" if one.tokens_equal is None else "yes" if one.tokens_equal else f"{one.equal_token_share:.0%}"
    return [
        one.contender,
        str(one.batch),
        median(one.s_per_token),
        f"{min(one.s_per_token):.2f}",
        f"{median(column('ttft_s'))} ({median(column('ttft_with_load_s'))})",
        median(column("read_nbytes_per_token"), GIB),
        f"{max(attempt.peak_anonymous_nbytes for attempt in good) / GIB:.2f}",
        "-" if peak_nbytes is None else f"{peak_nbytes / GIB:.2f}",
        "-" if kills is None else str(kills),
        median([attempt.disk_nbytes_per_s for attempt in good], GIB) + ("~" if unsteady else ""),
        median(one.bounds_s),
        median(one.distances),
        f"{min(one.distances):.2f}" if one.distances else "-",
        equal,
    ]
