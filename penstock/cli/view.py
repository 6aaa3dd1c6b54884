"""How forecasts of one kind are shown beside each other: the columns of sweeps and rankings, the document of --json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Paced(Protocol):
    """A forecast of any kind."""

    @property
    def tokens_per_s(self) -> float:
        """That are generated, or trained on."""

    @property
    def binds(self) -> str:
        """What it is bound by."""


P = TypeVar("P", bound=Paced)


@dataclass(frozen=True, kw_only=True, slots=True)
class View(Generic[P]):
    """Of forecasts of one kind."""

    columns: Sequence[str]
    """Of a sweep, behind the first; a ranking has the first `short` of them, and the last."""
    row: Callable[[P], Sequence[str]]
    short: int
    document: Callable[[P], dict[str, object]]
    rate: str
    """What tokens per second are, for the line of a chart."""
