"""How fast a run was, and how close to the limit that its plan sets."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.text import Text

from ..scheduler.plan import Plan
from ..scheduler.timeline import Record


@dataclass(kw_only=True)
class Stopwatch:
    """Notes when things happened: loading, the first token, each later one."""

    waited_s: Callable[[], float] = lambda: 0.0
    """Seconds that the model has waited for blocks so far."""
    started_ns: int = field(default_factory=time.monotonic_ns)
    loaded_ns: int = 0
    token_ns: list[int] = field(default_factory=list)
    waited_first_s: float = 0.0
    """What had been waited by the first token."""
    waited_last_s: float = 0.0

    def loaded(self, waited_s: Callable[[], float]) -> None:
        """The model can run."""
        self.waited_s = waited_s
        self.loaded_ns = time.monotonic_ns()

    def token(self) -> None:
        """One more token is known."""
        self.token_ns.append(time.monotonic_ns())
        self.waited_last_s = self.waited_s()
        if len(self.token_ns) == 1:
            self.waited_first_s = self.waited_last_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Times of one run in seconds. What needs a second token is None where there was one only."""

    tokens: int
    load_s: float
    first_token_s: float
    """From the start of generation."""
    total_s: float
    """From the start of loading to the last token."""
    s_per_token: float | None = None
    """Mean over the tokens after the first."""
    waited_s_per_token: float | None = None
    compute_s_per_token: float | None = None
    """The rest: the model's own computing, and hooks."""
    bound_s_per_token: float | None = None
    """The least that the links and the computing allow; None where nothing is streamed."""
    bound_by: str | None = None
    distance: float | None = None
    """Achieved over bound: 1 is the limit."""


def measure(watch: Stopwatch, plan: Plan, records: Iterable[Record]) -> Pace:
    """The pace of a run that made at least one token."""
    first, last = watch.token_ns[0], watch.token_ns[-1]
    sweeps = len(watch.token_ns) - 1
    pace = Pace(
        tokens=len(watch.token_ns),
        load_s=(watch.loaded_ns - watch.started_ns) / 1e9,
        first_token_s=(first - watch.loaded_ns) / 1e9,
        total_s=(last - watch.started_ns) / 1e9,
    )
    if sweeps == 0:
        return pace
    each = (last - first) / 1e9 / sweeps
    waited = (watch.waited_last_s - watch.waited_first_s) / sweeps
    pace = dataclasses.replace(
        pace, s_per_token=each, waited_s_per_token=waited, compute_s_per_token=max(each - waited, 0.0)
    )
    if plan.resident:
        return pace
    swept = _swept(plan, [record for record in records if record.start_ns >= first], sweeps)
    bound = swept.bound_s(max(each - waited, 0.0))
    return dataclasses.replace(
        pace,
        bound_s_per_token=bound,
        bound_by=swept.binds(max(each - waited, 0.0)),
        distance=each / bound if bound else None,
    )


def render(pace: Pace, plan: Plan) -> list[Text]:
    """The pace in two lines for people."""
    head = f"{pace.tokens} tokens in {pace.total_s:.2f} s: loaded in {pace.load_s:.2f} s, first token after "
    head += f"{pace.first_token_s:.2f} s"
    if pace.s_per_token:
        head += f", then {pace.s_per_token:.3f} s/token = {1 / pace.s_per_token:.2f} tokens/s"
    lines = [Text(head)]
    if pace.bound_s_per_token and pace.distance and pace.bound_by:
        emulated = " (emulated)" if plan.emulated else ""
        line = f"bound {pace.bound_s_per_token:.3f} s/token by {_link(plan, pace.bound_by)}{emulated}; achieved/bound "
        lines.append(Text.assemble(line, (f"{pace.distance:.2f}", "bold")))
        if pace.distance < 0.97:
            lines.append(Text("less than 1: the link was faster now than when it was measured"))
    return lines


def _swept(plan: Plan, records: list[Record], sweeps: int) -> Plan:
    """The plan of one of the sweeps that these records are of."""
    experts = plan.first_expert
    others = dataclasses.replace(
        plan, blocks=plan.blocks[:experts], disk_nbytes_per_sweep=plan.disk_nbytes_per_sweep - plan.expert_read_nbytes
    )
    used = others if sweeps == 1 else _used(others, records)
    # Which experts are read is what the routing and the cache made of it: those that were, each once, are the bound.
    read = sum(record.nbytes for record in records if record.kind == "read" and record.block >= experts)
    return dataclasses.replace(used, disk_nbytes_per_sweep=used.disk_nbytes_per_sweep + read // sweeps)


def _used(plan: Plan, records: list[Record]) -> Plan:
    """The plan of the sweeps that these records are of: an encoder runs for the first token only, for example."""
    read = {record.block for record in records if record.kind == "read"}
    copied = {record.block for record in records if record.kind == "copy"}
    on_disk = [block for block in plan.blocks if block.home == "disk"]
    below = [block for block in plan.blocks if block.home != "device" and block.processor == "device"]
    return dataclasses.replace(
        plan,
        disk_nbytes_per_sweep=int(plan.disk_nbytes_per_sweep * _share(read, {b.id: b.nbytes for b in on_disk})),
        link_nbytes_per_sweep=int(plan.link_nbytes_per_sweep * _share(copied, {b.id: b.nbytes for b in below})),
    )


def _share(used: set[int], nbytes: dict[int, int]) -> float:
    total = sum(nbytes.values())
    return sum(size for block, size in nbytes.items() if block in used) / total if total else 1.0


def _link(plan: Plan, binds: str) -> str:
    rate = {"disk": plan.links.disk_read, "host-to-device link": plan.links.h2d}.get(binds)
    return f"the {binds} at {rate / 2**30:.2f} GiB/s" if rate else f"the {binds}"
