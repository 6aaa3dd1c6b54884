"""How far a run is: what its commits hold beside weights and optimizer, so that it goes on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...memory.errors import UsageError
from .data.position import Position


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run is between two steps."""

    step: int = 0
    """Steps that are done."""
    position: Position
    """In the data."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides the results of a run, by the names of the options: numbers, texts, lists."""

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """In words, what was set otherwise when the run began."""
        names = dict.fromkeys((*self.settings, *settings))
        return [
            f"{name} was {_told(self.settings.get(name))} and is {_told(settings.get(name))}"
            for name in names
            if self.settings.get(name) != settings.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """As an object of numbers and texts."""
        return {"step": self.step, "position": self.position.to_json(), "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, value: object) -> Progress:
        """What `to_json` made.

        Raises:
            UsageError: it is something else.
        """
        try:
            if not isinstance(value, Mapping):
                raise TypeError("no object")
            step, settings = value["step"], value["settings"]
            if type(step) is not int or step < 0 or not isinstance(settings, Mapping):
                raise TypeError("a step and settings")
            return cls(step=step, position=Position.from_json(value["position"]), settings=dict(settings))
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"the run's last commit does not say how far it was ({error}): it was not made by penstock finetune. "
                "Go on with it from Python (penstock.resume), or begin a new run"
            ) from error


def _told(value: object) -> str:
    return "not set" if value is None else str(value)
