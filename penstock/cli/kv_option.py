"""What `--kv host=2GiB,disk=20GiB` says, read before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import typer

from ..budget import parse_budget
from ..memory.errors import UsageError
from ..scheduler.kv.choice import PolicyChoice, choice_for

PANEL = "Context"
CODECS: Final = ("int8", "int4")
"""As `penstock.TieredCache` takes them."""

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
KvPolicy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:TOKENS]",
        help="LOSSY: attend to so many tokens of the context, as this policy chooses them (quest, snapkv, window, …: "
        "see docs/kv.md), and read no others. Default: exact, all of them.",
        rich_help_panel=PANEL,
    ),
]
KvCodec = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(CODECS),
        help="LOSSY: keep keys and values in so many bits, in host memory and on disk. Default: as they are made.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvOption:
    """Budgets of keys and values, in bytes."""

    host: int
    disk: int
    device: int = 0
    choice: PolicyChoice = field(default_factory=PolicyChoice)
    """A policy of selection."""
    codec: str | None = None
    """Of full blocks; None to keep them as they are."""

    def max_memory(self) -> dict[str, int | str]:
        """As `penstock.TieredCache` takes it."""
        there: dict[str, int | str] = {"device": self.device} if self.device else {}
        return there | {"host": self.host, "disk": self.disk}


def read_policy(text: str | None, *, needs_tiers: bool = False) -> PolicyChoice:
    """What `--kv-policy` says; attention to all where it says nothing.

    Args:
        text: As it was given.
        needs_tiers: Whether there is nothing to choose among.

    Raises:
        UsageError: there is none of that name, its budget holds nothing, or it is lossy and there are no tiers.
    """
    choice = PolicyChoice() if text is None else choice_for(text, None)
    if choice.lossy and needs_tiers:
        raise UsageError(
            f"--kv-policy {text} chooses among keys and values in tiers: add --kv host=2GiB, and disk=… for more"
        )
    return choice


def read_codec(text: str | None, *, needs_tiers: bool = False) -> str | None:
    """What `--kv-codec` says.

    Args:
        text: As it was given.
        needs_tiers: Whether there are no blocks to code.

    Raises:
        UsageError: there is none of that name, or there are no tiers.
    """
    if text is not None and text not in CODECS:
        raise UsageError(f"--kv-codec {text} is not known: use {' or '.join(CODECS)}, or leave it out")
    if text is not None and needs_tiers:
        raise UsageError(
            f"--kv-codec {text} is about keys and values in tiers: add --kv host=2GiB, and disk=… for more"
        )
    return text


def read_kv(text: str | None, policy: PolicyChoice | None = None, codec: str | None = None) -> KvOption | None:
    """What was asked for; None where nothing was.

    Raises:
        UsageError: a tier or a size without meaning, no size for host memory, or a device's part beside what works in
            host memory and on disk.
    """
    if text is None:
        return None
    budget = parse_budget(text)
    if budget.host is None:
        raise UsageError(f"--kv {text}: say how much host memory keys and values may take, for example host=2GiB")
    if budget.device and codec is not None:
        raise UsageError(
            f"--kv {text} beside --kv-codec {codec}: blocks are coded in host memory and on disk; leave device= out, "
            "or the codec"
        )
    return KvOption(
        host=budget.host,
        disk=budget.disk or 0,
        device=budget.device or 0,
        choice=policy or PolicyChoice(),
        codec=codec,
    )


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
