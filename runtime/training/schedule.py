"""The learning rate of each step: a function of the step's number alone, so that a run that goes on needs no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...memory.errors import UsageError

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the learning rate changes over a run.

    Raises:
        UsageError: a number has no meaning.
    """

    kind: Kind
    """After the warm-up: it stays, or falls to 0 behind the last step in a line or as half a cosine."""
    steps: int
    """Of the whole run."""
    warmup: int = 0
    """Steps in which it rises in a line; the last of them has all of it."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"there is no schedule {self.kind!r}: give {', '.join(get_args(Kind))}")
        if self.steps < 1:
            raise UsageError(f"a run of {self.steps} steps has no meaning: give 1 or more")
        if not 0 <= self.warmup <= self.steps:
            raise UsageError(f"a warm-up of {self.warmup} steps is longer than the run, which has {self.steps}")

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        left = max(self.steps - step, 0) / max(self.steps - self.warmup, 1)
        return left if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


class LearningRate:
    """Sets the learning rates of parameter groups, as torch's schedulers do; what a group began with stays in it.

    Args:
        groups: `param_groups` of an optimizer, those of a run that goes on included.
        schedule: What they follow.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], schedule: Schedule) -> None:
        self._groups = groups
        self._schedule = schedule
        for group in groups:
            group.setdefault("initial_lr", group["lr"])

    def set(self, step: int) -> None:
        """Be ready for a step, counted from 0."""
        factor = self._schedule.factor(step)
        for group in self._groups:
            group["lr"] = group["initial_lr"] * factor

    @property
    def lr(self) -> float:
        """Of the first group, now."""
        return float(self._groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """For a commit: what the run followed."""
        kind, steps, warmup = self._schedule.kind, self._schedule.steps, self._schedule.warmup
        return {"kind": kind, "steps": steps, "warmup": warmup}
