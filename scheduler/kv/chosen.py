"""What became of a policy's choices: how many bytes were read, and how much of the attention was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenStatistics:
    """Of the calls of layers that chose, all layers and rows together; of others nothing is in it."""

    policy: str
    """Name and budget. It is lossy."""
    steps: int
    """Calls of layers in which something was chosen."""
    gathered_nbytes: int
    """Keys and values that were read in memory, the host's and a device's, to choose and to attend."""
    read_nbytes: int
    """Blocks that were read from disk, likewise."""
    scored_nbytes: int
    """Read in order to choose, as policies count it: what they keep about keys, and keys, which are above as well."""
    whole_nbytes: int
    """Keys and values that attention to all would have read."""
    recall: float | None
    """Part of the attention that went to what was chosen, on average over heads; None where nothing was compared."""
    least_recall: float | None
    """Of a head in a step."""
    compared_steps: int
    """Calls that were compared with attention to all. The first is, and then each of so many."""
    compared_nbytes: int
    """Read from disk for that, and for nothing else."""


class ChosenFigures:
    """Adds up what layers did. One per cache.

    Args:
        policy: As in `ChosenStatistics`.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self.steps = self.gathered_nbytes = self.read_nbytes = self.scored_nbytes = self.whole_nbytes = 0
        self._compared_steps = self._compared_nbytes = self._shares = 0
        self._sum = 0.0
        self._least = 1.0

    def compared(self, shares: Sequence[float], read_nbytes: int) -> None:
        """A call was compared: what its heads kept, and bytes that were read from disk for it."""
        self._compared_steps += 1
        self._compared_nbytes += read_nbytes
        self._shares += len(shares)
        self._sum += sum(shares)
        self._least = min(self._least, *shares) if shares else self._least

    def statistics(self) -> ChosenStatistics:
        """A frozen record."""
        return ChosenStatistics(
            policy=self._policy,
            steps=self.steps,
            gathered_nbytes=self.gathered_nbytes,
            read_nbytes=self.read_nbytes,
            scored_nbytes=self.scored_nbytes,
            whole_nbytes=self.whole_nbytes,
            recall=self._sum / self._shares if self._shares else None,
            least_recall=self._least if self._shares else None,
            compared_steps=self._compared_steps,
            compared_nbytes=self._compared_nbytes,
        )
