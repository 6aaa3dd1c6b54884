"""What is lacking where no layout fits: the smallest budgets under which one of those that were tried would have."""

from __future__ import annotations

import sys

from ..memory.errors import DoesNotFitError
from .layout import Budgets


class Shortfall:
    """Collects what cuts that did not fit would have needed."""

    def __init__(self) -> None:
        self._needs: dict[str, list[int]] = {"device": [], "host": []}
        """By tier: the smallest budgets of cuts that did not fit."""
        self._all_nbytes = sys.maxsize
        """The smallest budget under which some cut is resident as a whole."""

    def add(self, tier: str, needed_nbytes: int) -> None:
        """A cut would have fitted a budget of so much, and no smaller one."""
        self._needs[tier].append(needed_nbytes)

    def resident(self, nbytes: int) -> None:
        """A cut would stay as a whole under a budget of so much."""
        self._all_nbytes = min(self._all_nbytes, nbytes)

    def error(self, budgets: Budgets) -> DoesNotFitError:
        """Says what would do, and how to give it."""
        # a cut that got as far as the host tier fits the device
        tier = "host" if self._needs["host"] else "device"
        needed = min(self._needs[tier])
        budget = budgets.host if tier == "host" else budgets.device or 0
        return DoesNotFitError(
            f"the model needs at least {needed} bytes ({needed / 2**20:.1f} MiB) of {tier} memory to run, even "
            f"streamed; the budget is {budget} bytes ({budget / 2**20:.1f} MiB). Raise it: "
            f"max_memory={{{tier!r}: {needed}}} (--max-memory {tier}={-(-needed // 2**20)}MiB)",
            tier=tier,
            needed_nbytes=needed,
            available_nbytes=budget,
            resident_nbytes=self._all_nbytes,
        )
