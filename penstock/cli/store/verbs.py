"""The registry of `penstock store …`. A new verb is a file beside this one, and a line here.

As with all verbs, what takes long to import is imported inside the functions. `verify` and `prune` need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import typer

from .export import export
from .prune import prune
from .stats import stats
from .verify import verify

STORE_VERBS: Final[dict[str, Callable[..., int | None]]] = {
    "verify": verify,
    "stats": stats,
    "prune": prune,
    "export": export,
}


def store() -> typer.Typer:
    """The group of verbs that look after what runs and prompts keep on disk."""
    app = typer.Typer(
        help="Look after what training runs and prefix stores keep on disk: check, measure, shrink and export it.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    for name, verb in STORE_VERBS.items():
        app.command(name)(verb)
    return app
