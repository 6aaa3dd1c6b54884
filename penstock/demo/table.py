"""The table that the demonstration ends with."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..sizes import format_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """How one contestant did."""

    name: str
    budget: str
    """In words; empty where there is none."""
    peak_nbytes: int
    s_per_token: float
    bound_s: float | None
    """The least time per token that this machine allows under that budget; None for the resident model."""
    bound_by: str | None
    equal: bool
    """Whether its tokens are the resident model's."""

    @property
    def distance(self) -> float | None:
        """Measured over bound: 1 is the limit."""
        return None if self.bound_s is None else self.s_per_token / self.bound_s


def show(console: Console, title: str, rows: list[Row], footnotes: list[str], commands: list[str]) -> None:
    """Print the table, what its figures rest on, and what to try next."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(row.name, justify="right")
    table.add_row("memory budget", *(row.budget for row in rows))
    table.add_row("peak memory", *(format_size(row.peak_nbytes) for row in rows), end_section=True)
    table.add_row("tokens/s", *(f"{1 / row.s_per_token:.2f}" for row in rows))
    table.add_row("s/token", *(f"{row.s_per_token:.3f}" for row in rows))
    table.add_row("bound, s/token", *("" if r.bound_s is None else f"{r.bound_s:.3f} ({r.bound_by})" for r in rows))
    table.add_row("distance", *("" if row.distance is None else f"{row.distance:.2f}" for row in rows))
    table.add_row("tokens equal", *(Text("yes", "green") if row.equal else Text("NO", "bold red") for row in rows))
    console.print(table, *(Text(note, "dim") for note in footnotes), "\nTry next:", sep="\n", soft_wrap=False)
    for command in commands:
        console.print(Text.assemble("  ", (command, "cyan")), soft_wrap=True)  # whole lines can be copied
