"""The registry of `penstock moe …`. A new verb is a file beside this one, and a line here.

As with all verbs, what takes long to import is imported inside the functions. None but `record` needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import typer

from .generate import generate
from .record import record
from .replay import replay
from .report import report

MOE_VERBS: Final[dict[str, Callable[..., int | None]]] = {
    "generate": generate,
    "record": record,
    "replay": replay,
    "report": report,
}


def moe() -> typer.Typer:
    """The group of verbs that look at how mixtures of experts are routed, and what caches make of it."""
    app = typer.Typer(
        help="Mixtures of experts: record routing traces, make some up, and try out what caches would do with them.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    for name, verb in MOE_VERBS.items():
        app.command(name)(verb)
    return app
