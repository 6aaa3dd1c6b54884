"""Updates that are owed to parts of parameters: those of steps in which a part had a gradient of zero.

Nothing of such an update depends on anything but the hyperparameters of its step and how many there have been before,
so it can be made at any time before somebody looks at the part, as long as all that are owed are made in their order.
The ledger keeps what steps said, once per parameter, and how far each part has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

MOST: Final = 64
"""Updates that a part may owe: more bound neither what is kept of steps, nor what somebody waits for who needs it."""

FADES: Final = 0.9
"""What a step counts for after the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwedUpdate:
    """What a step said about a parameter."""

    hyper: Any
    """Its hyperparameters."""
    count: int
    """Which update of the parameter it is, from 1."""


class OwedUpdates:
    """Which updates parts have had.

    Args:
        parts: The parameter of each part.
    """

    def __init__(self, parts: Mapping[int, int]) -> None:
        self._parameter = dict(parts)
        self._parts: dict[int, list[int]] = {}
        for part, parameter in parts.items():
            self._parts.setdefault(parameter, []).append(part)
        self._kept: dict[int, list[OwedUpdate]] = {parameter: [] for parameter in self._parts}
        """By parameter: what the last steps said, oldest first."""
        self._dropped = dict.fromkeys(self._parts, 0)
        """How many steps before those are not kept any more."""
        self._had = dict.fromkeys(parts, 0)
        """How many updates each part has had."""

    def __contains__(self, part: int) -> bool:
        """Whether a part may owe."""
        return part in self._parameter

    def step(self, parameter: int, update: OwedUpdate) -> None:
        """One more update, which all parts of a parameter owe from now on."""
        kept = self._kept[parameter]
        least = min(self._had[part] for part in self._parts[parameter]) - self._dropped[parameter]
        del kept[:least]
        self._dropped[parameter] += least
        kept.append(update)

    def owed(self, part: int) -> int:
        """How many a part owes."""
        parameter = self._parameter[part]
        return self._dropped[parameter] + len(self._kept[parameter]) - self._had[part]

    def settle(self, part: int) -> tuple[OwedUpdate, ...]:
        """What a part owes, oldest first; it is made now."""
        owed = self.owed(part)
        self._had[part] += owed
        kept = self._kept[self._parameter[part]]
        return tuple(kept[len(kept) - owed :])

    def owing(self, parameter: int) -> list[int]:
        """The parts of a parameter that owe."""
        return [part for part in self._parts[parameter] if self.owed(part)]

    @property
    def parameters(self) -> list[int]:
        """Those that have parts."""
        return list(self._parts)


class Idleness:
    """How soon parts of a block that were idle in a step are wanted again."""

    def __init__(self) -> None:
        self._idle: Set[int] = frozenset()
        self._were = self._back = 0.0

    def step(self, idle: Set[int]) -> float:
        """One more step, in which these were idle.

        Returns:
            The share of idle parts that were not idle in the step after; of the last steps most. 0 until one was idle.
        """
        self._were = FADES * self._were + len(self._idle)
        self._back = FADES * self._back + len(self._idle - idle)
        self._idle = frozenset(idle)
        return self._back / self._were if self._were else 0.0


def worth_owing(*, spared_nbytes: int, again: float, weights_nbytes: int) -> bool:
    """Whether steps move less where idle parts of a block are left out.

    Args:
        spared_nbytes: What a step neither reads nor writes of masters and states, then.
        again: The share of it that has to be read and written when the next step begins: see `Idleness`.
        weights_nbytes: Of the block's weights, where they lie on disk: they are to be read, since not all of them are
            made anew, and may have to be written once more when parts catch up. 0 where they stay in memory.
    """
    return spared_nbytes * (1 - again) > 2 * weights_nbytes
