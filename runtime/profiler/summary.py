"""What a profile comes to: the figures that every report, check and comparison shows, computed once by `metrics`.

Definitions. W is the window, |·| the length of a union of intervals clipped to W, C the union of compute spans less the
union of waits (a module that waits for its block does not compute), X_e the union of transfers on link e. All shares
are of 1; None stands for what cannot be said (a share of nothing, a rate that was not measured). Gaps inside a span of
a module count as computing.
"""

from __future__ import annotations

import msgspec

from .schema import Category


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time without computing went, in nanoseconds. The five causes sum to the bubble exactly.

    Each idle instant is charged to the next use of a block by a consumer, in this order.
    """

    disk: int = 0
    """Its bytes were being read."""
    link: int = 0
    """They were in host memory and on their way to the device."""
    space: int = 0
    """It was wanted and had no slot yet, or its transfer had not begun."""
    host: int = 0
    """It was there; the processor had not been asked to compute: Python, sampling, tokenising, launching."""
    other: int = 0
    """No use of a block follows: before the first and after the last, or nothing was streamed."""

    @property
    def total(self) -> int:
        """The whole bubble."""
        return self.disk + self.link + self.space + self.host + self.other


class LinkUse(msgspec.Struct, frozen=True, kw_only=True):
    """One link over the window."""

    link: str
    """Name of `schema.Link`."""
    transfers: int
    nbytes: int
    busy_ns: int
    """|X_e|"""
    overlap: float | None
    """|X_e ∩ C| / |X_e|"""
    exposed_ns: int
    """|X_e| − |X_e ∩ C|: moving while nothing computed."""
    bandwidth: float | None
    """nbytes / |X_e|, bytes per second."""
    peak: float | None
    """Measured bytes per second of this link when nothing else runs."""
    efficiency: float | None
    """bandwidth / peak."""
    amplification: float | None
    """Bytes moved / bytes of the distinct blocks that were moved."""


class PrefetchUse(msgspec.Struct, frozen=True, kw_only=True):
    """How well bytes were there before they were needed."""

    uses: int
    """Leases of blocks."""
    on_time: float | None
    """Share of uses that did not wait."""
    streamed_uses: int
    """Uses whose block was brought for them."""
    streamed_on_time: float | None
    wasted: float | None
    """Bytes brought and never used / bytes brought."""
    median_lead_ns: int | None
    """From the decision to bring a block to its use."""
    early_byte_seconds: float
    """Σ nbytes × (use − ready) over blocks that were early: memory spent on being early."""
    waited_ns: int
    """Sum of all waits."""


class ExpertUse(msgspec.Struct, frozen=True, kw_only=True):
    """Whether experts were there when their layer asked. A use is one part of an expert, of which each has two."""

    uses: int
    hits: int
    """Those that were kept."""
    missed: int
    """Those that were read, or copied, because the layer asked."""
    ahead_in_time: int
    """Those that were brought before it asked, and were there."""
    ahead_late: int
    """Those that were brought before it asked, and were still on their way."""
    ahead_for_nothing: int
    """Parts that were brought, and that the layer did not ask for. No uses."""


class MemoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an attribution."""

    name: str
    """A category, or a module's path."""
    nbytes: int


class TierPeak(msgspec.Struct, frozen=True, kw_only=True):
    """A tier at the instant at which it held most."""

    tier: str
    at_ns: int
    """Of the instants within 2 % of the highest reading the one at which most is accounted for."""
    nbytes: int
    """The highest reading of the system: RSS, or used device memory; what the records say where no gauge was read."""
    categories: tuple[MemoryRow, ...]
    """Largest first; those of the records, and the baseline."""
    modules: tuple[MemoryRow, ...]
    """Largest first: bytes of all categories by module."""
    unaccounted_nbytes: int
    """nbytes − fragmentation − Σ categories. Negative where pages were counted before they were touched."""
    named: float
    """Share of the bytes in use that are tensors, arenas or the baseline:
    1 − (|unaccounted| + library) / (nbytes − fragmentation). What imports added has a row and says no more."""
    capacity_nbytes: int | None
    budget_nbytes: int | None
    fragmentation_nbytes: int | None
    """What an allocator keeps and nobody uses: on a device reserved − allocated; on the host what is free and resident
    of glibc's main heap, at least. None where nothing told at that instant."""

    @property
    def growth_nbytes(self) -> int:
        """What came on top of the baseline: a budget bounds that, and not what the process held before."""
        before = sum(row.nbytes for row in self.categories if row.name == Category.BASELINE.name)
        return max(0, self.nbytes - before)


class Leak(msgspec.Struct, frozen=True, kw_only=True):
    """Live bytes that grow from step to step."""

    tier: str
    nbytes_per_step: float
    """Theil–Sen slope of live bytes at step ends after warm-up (Sen, 1968)."""
    steps: int
    module: str = ""
    """The module whose bytes grow most, where the records know one."""


class ModuleUse(msgspec.Struct, frozen=True, kw_only=True):
    """One module over the window."""

    path: str
    kind: str
    calls: int
    total_ns: int
    """Its spans, with those of modules inside it."""
    self_ns: int
    """Without them."""
    forward_ns: int
    """Of self_ns."""
    backward_ns: int
    optimizer_ns: int
    waited_ns: int
    moved_nbytes: dict[str, int]
    """By name of link: transfers of blocks that it leases."""
    peak_nbytes: dict[str, int]
    """By name of category: the most that was live at once."""


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Joules over the window, where meters could be read."""

    cpu_j: float | None
    device_j: float | None
    per_token_j: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures."""

    window_ns: tuple[int, int]
    """Steady steps (all but the first, where there are three or more), else everything."""
    steps: int
    """Of the window."""
    step_ns: int | None
    """Median."""
    tokens: int
    tokens_per_s: float | None
    compute_ns: int
    """|C|"""
    bubble: float | None
    """1 − |C| / |W|"""
    idle: Idle
    links: tuple[LinkUse, ...]
    """Those that moved anything."""
    bound_ns: float | None
    """max(|C|, max over links of bytes / peak): the least time that the window could take."""
    distance: float | None
    """|W| / bound."""
    binds: str
    """What the bound comes from: compute, or the name of a link; "" for an empty run."""
    prefetch: PrefetchUse
    peaks: tuple[TierPeak, ...]
    leaks: tuple[Leak, ...]
    modules: tuple[ModuleUse, ...]
    """Most waiting first, then most time."""
    energy: Energy
    recorded: int
    dropped: int
    overhead: float | None
    """The recorder's own CPU time / |everything that was recorded|."""
    tklqt_ns: int | None
    """Σ (kernel begins − launch begins) over the steps that kineto saw; None where it saw none (arXiv 2504.11750)."""
    tklqt_steps: int = 0
    """How many steps that is of; 0 of a part of one."""
    tklqt_launches: int = 0
    """How many launches."""
    behind_ns: int | None = None
    """How far the device runs behind the host: the median of (start − launched) of recorded modules that know it. An
    estimate from modules; it is no TKLQT."""
    verdict: str
    """One sentence in plain words: what binds, where the idle time goes, what would help most."""
    experts: ExpertUse | None = None
    """Where experts are blocks of their own."""
