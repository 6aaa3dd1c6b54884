"""The registry of `penstock prof …`. A new verb is a file beside this one, and a line here.

As with all verbs, what takes long to import is imported inside the functions. Only `run` needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import typer

from .check import check
from .diff import diff
from .export import export
from .live import live
from .report import report
from .run import run
from .stats import stats

PROF_VERBS: Final[dict[str, Callable[..., int | None]]] = {
    "run": run,
    "live": live,
    "stats": stats,
    "report": report,
    "diff": diff,
    "check": check,
    "export": export,
}


def prof() -> typer.Typer:
    """The group of verbs that look at profiles."""
    app = typer.Typer(
        help="See where memory and time go: watch, read, compare and check profiles.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    for name, verb in PROF_VERBS.items():
        # what follows the script's name is the script's own
        app.command(name, context_settings={"allow_interspersed_args": False} if verb is run else None)(verb)
    return app
