"""Which policy of selection a cache attends by, and with how much: what `--kv-policy quest:4096` says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from ...memory.errors import UsageError
from .policies import DENSE_LAYERS, POLICIES, policy
from .policies.exact import Exact
from .policies.policy import Heads, Setting
from .shape import TOKENS

BUDGET_TOKENS: Final = 4096
"""Per key-value head, where nothing else is said."""
RECALL_EVERY: Final = 64
"""Steps of a layer, of which the first is compared with attention to all: that reads everything."""
_OPTIONS: Final = {"sinks": "sinks", "recent": "recent", "dense": "dense_layers", "recall": "recall_every"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyChoice:
    """A policy and its settings. All but `exact` are lossy."""

    name: str = Exact.name
    budget_tokens: int = BUDGET_TOKENS
    """Attended to in a step, per key-value head, what is always kept included."""
    sinks: int = 4
    """First tokens, which are always kept."""
    recent: int = 64
    """Last tokens, likewise."""
    dense_layers: int = DENSE_LAYERS
    """First layers, which attend to all."""
    recall_every: int = RECALL_EVERY
    """Steps of a layer; of each so many one is compared with attention to all. 1 compares all of them."""

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise UsageError(f"policy {self.name!r} is not known: use {', '.join(POLICIES)}")
        if self.dense_layers < 0 or self.recall_every < 1:
            raise UsageError(
                f"dense={self.dense_layers}, recall={self.recall_every}: layers that attend to all are 0 at least, and "
                "recall is measured each so many steps, 1 at least"
            )

    @property
    def lossy(self) -> bool:
        """Whether anything is left out."""
        return self.name != Exact.name

    @property
    def salt(self) -> str:
        """All that changes what is computed, for names of what was computed; nothing where that is attention to all.

        `recall_every` only measures.
        """
        if not self.lossy:
            return ""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "recall_every"}
        return "policy " + " ".join(f"{name}={value}" for name, value in told.items())

    def setting(self, block_tokens: int) -> Setting:
        """What the policy of a layer is given.

        Raises:
            UsageError: the budget does not hold what is always kept.
        """
        setting = Setting(
            budget_tokens=self.budget_tokens, sinks=self.sinks, recent=self.recent, block_tokens=block_tokens
        )
        if self.lossy:  # made and thrown away: what it refuses is said before a model runs
            policy(self.name, Heads(kv_heads=1, group=1, dim=2, itemsize=2), setting, layer=0, dense_layers=0)
        return setting

    def __str__(self) -> str:
        return f"{self.name}:{self.budget_tokens}" if self.lossy else self.name


def read_choice(text: str, budget: int | None = None) -> PolicyChoice:
    """A choice as people write it: "exact", "quest", "quest:4096", "quest:4096,recent=128,sinks=4,dense=2,recall=64".

    Args:
        text: Of the choice.
        budget: In tokens, where the text has none.

    Raises:
        UsageError: no such policy, an option that is not known, a number that is none, or a budget for `exact`.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, int] = {}
    for number, part in enumerate(rest.split(",") if colon else ()):
        key, equals, value = part.partition("=")
        if number == 0 and not equals:
            settings["budget_tokens"] = _count(text, part)
        elif key in _OPTIONS and equals:
            settings[_OPTIONS[key]] = _count(text, value)
        else:
            raise UsageError(f"policy {text!r}: {part!r} is not known: write NAME:TOKENS, then {', '.join(_OPTIONS)}=N")
    if budget is not None:
        if "budget_tokens" in settings:
            raise UsageError(f"policy {text!r} says how many tokens, and the budget is {budget}: give one of them")
        settings["budget_tokens"] = budget
    if settings and name == Exact.name:
        raise UsageError(f"policy {text!r} attends to all: it takes no budget and no options")
    return PolicyChoice(name=name, **settings)


def choice_for(policy: str | PolicyChoice, budget: int | None, block_tokens: int = TOKENS) -> PolicyChoice:
    """What a cache was asked for, checked as far as it can be without a model.

    Raises:
        UsageError: see `read_choice` and `PolicyChoice.setting`.
    """
    if isinstance(policy, PolicyChoice):
        if budget is not None:
            raise UsageError(f"the policy has a budget of {policy.budget_tokens} tokens: leave out budget={budget}")
        choice = policy
    else:
        choice = read_choice(policy, budget)
    if choice.lossy:
        choice.setting(block_tokens)
    return choice


def _count(text: str, number: str) -> int:
    if not (number.isascii() and number.isdecimal()):
        raise UsageError(f"policy {text!r}: {number!r} is not a number of tokens; write for example quest:4096")
    return int(number)
