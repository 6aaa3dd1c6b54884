"""The plan in words and as a table, for terminals and notebooks."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

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


class Explanation:
    """What `penstock.explain` returns: prints as text, draws itself in notebooks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(plan_renderable(self.plan))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return plan_renderable(self.plan)

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=100)
        console.print(plan_renderable(self.plan))
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def explain_html(handle: Handle) -> str:
    """The plan of a handle as HTML."""
    return Explanation(handle.plan)._repr_html_()
