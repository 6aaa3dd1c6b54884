"""The plan in words and as a table, for terminals and notebooks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..scheduler.experts.account import HitCause, PhaseResult
from ..scheduler.experts.forecast import ExpertForecast
from ..scheduler.plan import Home, Plan
from ..scheduler.processors import ALWAYS

if TYPE_CHECKING:
    from .handle import Handle


def gib(nbytes: float) -> str:
    """Bytes in the unit that a reader wants."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes / 1024:.0f} KiB"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def plan_renderable(plan: Plan) -> RenderableType:
    """The plan for rich."""
    label = " device" if plan.emulated else ""
    if plan.resident:
        head = f"everything fits: {gib(plan.weights_nbytes)} of weights resident on {plan.device}{label}, no hooks"
        return Group(Text(head, style="bold"), *(Text(note) for note in plan.notes))
    table = Table(title=f"plan for {gib(plan.weights_nbytes)} of weights on {plan.device}{label}", title_justify="left")
    for column, justify in (("tier", "left"), ("blocks", "right"), ("weights", "right"), ("memory", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("moved per sweep", justify="right")
    rows: list[tuple[Home, str, str]] = []
    if plan.device_budget_nbytes is not None:
        used = f"{gib(plan.device_nbytes)} of {gib(plan.device_budget_nbytes)}"
        rows.append(("device", used, gib(plan.link_nbytes_per_sweep)))
    rows.append(("host", f"{gib(plan.host_nbytes)} of {gib(plan.host_budget_nbytes)}", ""))
    rows.append(("disk", "", gib(plan.disk_nbytes_per_sweep)))
    for home, memory, moved in rows:
        table.add_row(home, str(plan.blocks_at(home)), gib(plan.home_nbytes(home)), memory, moved)
    lines = [Text(f"ring of {plan.slots} slots of {gib(plan.slot_nbytes)}; " + _tables(plan))]
    if plan.expert_passing:
        lines.append(Text(_experts(plan)))
    if plan.on_cpu():
        lines.append(Text(_on_cpu(plan)))
        lines.append(Text("many prompts at once: as much of that as pays, while the device goes on with other prompts"))
    terms = ", ".join(f"{name} {seconds(value)}" for name, value in plan.terms.items())
    if terms:
        lines.append(Text(f"at least {seconds(plan.bound_s())} per sweep ({terms}); bound by the {plan.binds()}"))
    suggestion = plan.suggestion()
    if suggestion:
        lines.append(Text(suggestion))
    return Group(table, *lines, *(Text(note) for note in plan.notes))


def _tables(plan: Plan) -> str:
    return f"read by rows: {', '.join(plan.tables)}" if plan.tables else "no tables read by rows"


def _experts(plan: Plan) -> str:
    """How many experts are near at a time."""
    return (
        f"experts of {gib(plan.expert_nbytes)}: {plan.expert_slots} are kept at a time, and {plan.expert_passing} can "
        "be on their way through"
    )


def _on_cpu(plan: Plan) -> str:
    """What the CPU computes, and below how many tokens."""
    blocks = plan.on_cpu()
    least, most = (pick(block.cpu_rows_below for block in blocks) for pick in (min, max))
    below = f"{least}" if least == most else f"{least} to {_tokens(most)}"
    when = "" if least >= ALWAYS else f" below {below} tokens"
    nbytes = sum(block.nbytes for block in blocks)
    return f"{len(blocks)} blocks ({gib(nbytes)}) computed on the CPU{when}"


def _tokens(rows: int) -> str:
    return "any number of" if rows >= ALWAYS else str(rows)


def foreseen_text(foreseen: ExpertForecast) -> str:
    """What a step is expected to need of experts."""
    how = "made-up routing, whose skew is like that of a real model" if foreseen.assumed else foreseen.source
    copied = f" and {gib(foreseen.copied_nbytes)} copied" if foreseen.copied_nbytes else ""
    return (
        f"foreseen of experts by {how}: a step uses {foreseen.uses:.1f} and misses {foreseen.missed:.1f} of them; "
        f"{gib(foreseen.read_nbytes)} read{copied} ({_causes(foreseen.hits)})"
    )


def measured_text(counted: PhaseResult) -> str:
    """What steps have needed of experts so far."""
    tokens = max(counted.tokens, 1)
    missed = sum(counted.misses.values()) / tokens
    copied = f" and {gib(counted.copied_nbytes / tokens)} copied" if counted.copied_nbytes else ""
    by_cpu = f", {counted.computed_by_cpu / tokens:.1f} computed by the CPU" if counted.computed_by_cpu else ""
    return (
        f"experts of {counted.tokens} tokens so far: {counted.uses / tokens:.1f} uses per token, {missed:.1f} "
        f"missed{by_cpu}; {gib(counted.read_nbytes / tokens)} read{copied} "
        f"({_causes({cause: count / tokens for cause, count in counted.hits.items()})})"
    )


def _causes(hits: Mapping[HitCause, float]) -> str:
    found = [f"{count:.1f} {cause}" for cause, count in hits.items() if count]
    return f"hits: {', '.join(found)}" if found else "no hits"


class Explanation:
    """What `penstock.explain` returns: prints as text, draws itself in notebooks.

    Args:
        plan: Of the model.
        experts: What is foreseen of experts that are blocks of their own, or what was measured; "" where there are
            none.
    """

    def __init__(self, plan: Plan, experts: str = "") -> None:
        self.plan = plan
        self.experts = experts

    def _renderable(self) -> RenderableType:
        plan = plan_renderable(self.plan)
        return Group(plan, Text(self.experts)) if self.experts else plan

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(self._renderable())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return self._renderable()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=100)
        console.print(self._renderable())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def explain_html(handle: Handle) -> str:
    """The plan of a handle as HTML."""
    return handle.explained()._repr_html_()
