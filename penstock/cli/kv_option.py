"""What `--kv host=2GiB,disk=20GiB` says, read before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..budget import parse_budget
from ..memory.errors import UsageError

PANEL = "Context"

Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Tokens to leave room for. Default: the prompt and what is new.", rich_help_panel=PANEL
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="Keep keys and values in tiers: device=1GiB,host=2GiB,disk=20GiB. Default: all in memory.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvOption:
    """Budgets of keys and values, in bytes."""

    host: int
    disk: int
    device: int = 0

    def max_memory(self) -> dict[str, int | str]:
        """As `penstock.TieredCache` takes it."""
        there: dict[str, int | str] = {"device": self.device} if self.device else {}
        return there | {"host": self.host, "disk": self.disk}


def read_kv(text: str | None) -> KvOption | None:
    """What was asked for; None where nothing was.

    Raises:
        UsageError: a tier or a size without meaning, or no size for host memory.
    """
    if text is None:
        return None
    budget = parse_budget(text)
    if budget.host is None:
        raise UsageError(f"--kv {text}: say how much host memory keys and values may take, for example host=2GiB")
    return KvOption(host=budget.host, disk=budget.disk or 0, device=budget.device or 0)


def check_context(context: int | None, tokens: int) -> int:
    """The tokens to leave room for.

    Raises:
        UsageError: fewer than there will be.
    """
    if context is not None and context < tokens:
        raise UsageError(
            f"--context {context} is less than the {tokens} tokens of the prompt and --max-new-tokens: raise it, or "
            "leave it out"
        )
    return context or tokens
