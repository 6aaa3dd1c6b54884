"""Which calls of a root have its layers recorded, so that recording stays cheap. No torch.

Between the operations of a large model a hook finds nothing of itself in the processor's caches: it costs some 50 µs
where a loop over hooks measures five, and 25 where every module has one. That is nothing in a call of a second, and
several percent of one of a millisecond. So a root's layers are recorded in one of so many of its calls that their hooks
stay below a share of what the calls take.

While gradients are on, calls belong together: a backward pass, and the activations that it waits for, are told by the
modules of its forward. There whole steps take turns.
"""

from __future__ import annotations

from typing import Final

COLD_NS: Final = 50_000
"""What the hooks of one layer cost."""
SHARE: Final = 0.002
"""Of the time of the calls, at most; but for the first ones, and one in `RAREST`."""
EVERY_COLD_NS: Final = 25_000
"""What those of one module cost where all modules are recorded, coming and going included."""
EVERY_SHARE: Final = 0.015
"""Of the time of the calls, there."""
FIRST: Final = 2
"""Calls that are recorded whole, whatever that costs: a prompt, and the token after it."""
RAREST: Final = 64
EVENT_NS: Final = 100_000
"""What it costs to look at one thing in a step that is looked at whole: a module, its backward, a saved tensor. The
operations between them take longer as well: 75 ms of 610 for some 670 things, in the training of docs/benchmarks.md."""
STEP_SHARE: Final = 0.02
"""Of the time of the steps, at most; but for the first ones, and one in `RAREST`."""
LIGHT_EVENT_NS: Final = 250_000
"""The same where only layers are recorded: each is a call, a backward, and the gradients of its weights."""
LIGHT_STEP_SHARE: Final = 0.002
FIRST_STEPS: Final = 3
"""Steps that are looked at whole, whatever that costs: the first ones make gradients, states and caches."""


class StepTurns:
    """Which steps are looked at whole.

    Args:
        share: Of the time of the steps, what looking may take at most.
    """

    def __init__(self, *, event_ns: int = EVENT_NS, share: float = STEP_SHARE) -> None:
        self._event_ns = event_ns
        self._share = share
        self._begun = 0
        self._since = 0
        """Steps begun since the last one that was looked at."""
        self._cost_ns = 0
        """What the last one that was looked at has cost."""
        self._at, self._events = 0, 0
        """When the step under way began, and how many things had been looked at before it."""
        self._took_ns = 0
        """What steps take: the shortest of the last few."""
        self.looking = True
        """Whether the step under way is one that is looked at, or what comes before the first."""

    def begins(self, at: int, events: int) -> bool:
        """A step begins at this time of a clock, in nanoseconds, after so many things were looked at in all.

        Returns False: deciding takes no time.
        """
        if self._begun:
            took_ns = at - self._at
            self._took_ns = min(took_ns, self._took_ns * 9 // 8 + 1) if self._took_ns else took_ns
            if self.looking:
                self._cost_ns = (events - self._events) * self._event_ns
        self._at, self._events = at, events
        self._begun += 1
        self._since += 1
        self.looking = (
            self._begun <= FIRST_STEPS
            or self._since >= RAREST
            or self._since * self._took_ns * self._share >= self._cost_ns
        )
        if self.looking:
            self._since = 0
        return False


class Turns:
    """The calls of one root.

    Args:
        layers: How many of its layers carry hooks in a call that is recorded whole.
        cold_ns: What those of one cost.
        share: Of the time of the calls, at most.
    """

    def __init__(self, layers: int, *, cold_ns: int = COLD_NS, share: float = SHARE) -> None:
        self._cost_ns = layers * cold_ns
        self._share = share
        self._begun = 0
        self._since = 0
        """Calls begun since the last one that was recorded whole."""
        self._took_ns = 0
        """What calls take: the shortest of the last few."""

    def next(self) -> bool:
        """A call begins: whether its layers are recorded."""
        self._begun += 1
        self._since += 1
        if self._begun > FIRST and self._since * self._took_ns * self._share < self._cost_ns and self._since < RAREST:
            return False
        self._since = 0
        return True

    def took(self, ns: int) -> None:
        """A call lasted so long."""
        # A prompt may take a hundred times what a token does: what is short now counts, and is forgotten slowly.
        self._took_ns = min(ns, self._took_ns * 9 // 8 + 1) if self._took_ns else ns
