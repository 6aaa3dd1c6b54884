"""Steps that backward begins: a block is submitted as soon as its last gradient is there.

Gradients of blocks that are not whole yet wait in memory, as many as the largest block has. Where more would have to
(experts without tokens leave blocks that never become whole), those that have waited longest go to disk, and come back
beside their shards when `step()` submits what is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from ...memory.errors import DiskError, PenstockError, StallError, UsageError
from .gradients import Gradient, SpilledGradient
from .spill import GradientSpill
from .updater import SMALL, Step, Updater

BEHIND: Final = 3
"""Blocks whose gradients wait for their update, before backward waits for that."""
Hypers = Callable[[], Sequence[Any]]
"""Hyperparameters of each parameter, as they are now."""


class NonFiniteGradientError(PenstockError):
    """A gradient is infinite or not a number."""


class EarlySteps:
    """The step that backward has begun, if it has.

    Args:
        names: Of the parameters.
        blocks: Of each parameter.
        sizes: Bytes of each parameter's gradient, as it is kept.
        counts: How many updates each parameter has had; counted on as gradients come.
        updater: Changes blocks.
        spill: Where gradients go that would have to wait in memory for too long; None where all may.
        hypers: Asked when a step begins.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        blocks: Sequence[int],
        sizes: Sequence[int],
        counts: list[int],
        updater: Updater,
        spill: GradientSpill | None,
        hypers: Hypers,
    ) -> None:
        self._names = names
        self._blocks = blocks
        self._sizes = sizes
        self._counts = counts
        self._updater = updater
        self._spill = spill
        self._hypers = hypers
        self._parameters: dict[int, list[int]] = {}
        """Of each block."""
        for index, block in enumerate(blocks):
            self._parameters.setdefault(block, []).append(index)
        self.hold_nbytes = max(
            (sum(self._movable(index) for index in indices) for indices in self._parameters.values()), default=0
        )
        """What may wait in memory in blocks that are not whole, of gradients that could go to disk."""
        self._step: Step | None = None
        self._missing: Counter[int] = Counter()
        """Parameters of each block whose gradients have not come. A block is submitted when none is."""
        self._used: set[int] = set()
        """Parameters whose gradients have."""
        self._submitted: set[int] = set()
        """Blocks."""
        self._waiting: dict[int, list[int]] = {}
        """Blocks that are not whole, those that have waited longest first: parameters whose gradients wait in memory
        and could go to disk."""
        self.lost: PenstockError | None = None
        """Why the model is between two steps for good."""

    @property
    def begun(self) -> bool:
        """Whether parts of the model may be a step ahead of others."""
        return self._step is not None

    @property
    def waiting_nbytes(self) -> int:
        """Of gradients in memory that could go to disk, in blocks that are not whole."""
        return sum(self._sizes[index] for waiting in self._waiting.values() for index in waiting)

    def arrived(self, index: int, gradient: torch.Tensor) -> None:
        """A gradient is whole (called in backward, which waits here while too many blocks wait for their update).

        Raises:
            UsageError: it is a second one.
            NonFiniteGradientError: it is not finite.
            PenstockError: an update failed, or a gradient cannot be brought to disk.
        """
        if self._step is None:
            self._updater.check()
            self._begin()
        step = self._step
        assert step is not None
        if index in self._used:
            raise UsageError(
                f"a second gradient of {self._names[index]} before step(), and the first has gone into an update "
                "already: call step() after each backward pass, or say how many there are with accumulate=…"
            )
        self._use(step, index, gradient)
        block = self._blocks[index]
        self._missing[block] -= 1
        if block == SMALL:
            return
        if self._movable(index):
            self._waiting.setdefault(block, []).append(index)
        if self._missing[block]:
            self._make_room(step, block)
            return
        self._waiting.pop(block, None)
        self._updater.wait_below(BEHIND)
        self._await_disk(step, block)
        self._submitted.add(block)
        self._updater.submit(step, [block])

    def _begin(self) -> None:
        self._step = Step(
            gradients=[None] * len(self._names),
            hypers=self._hypers(),
            counts=[count + 1 for count in self._counts],
            clip=None,
        )
        self._missing = Counter(self._blocks)
        self._used, self._submitted, self._waiting = set(), set(), {}

    def _movable(self, index: int) -> int:
        """Bytes of a gradient that could go to disk; 0 for others."""
        return self._sizes[index] if self._spill is not None and index in self._spill else 0

    def _make_room(self, step: Step, block: int) -> None:
        """Send gradients of other blocks to disk, until no more wait than may."""
        while self.waiting_nbytes > self.hold_nbytes:
            oldest = next(other for other in self._waiting if other != block)
            for index in self._waiting.pop(oldest):
                self._send(step, index)

    def _send(self, step: Step, index: int) -> None:
        assert self._spill is not None
        gradient = step.gradients[index]
        assert isinstance(gradient, torch.Tensor)
        with self._midway():
            self._spill.put(index, gradient)
        step.gradients[index] = SpilledGradient(elements=len(gradient), norm=None)

    def _await_disk(self, step: Step, block: int) -> None:
        """Wait until what has gone to disk of a block is there: its update reads it."""
        sent = [index for index in self._parameters[block] if isinstance(step.gradients[index], SpilledGradient)]
        if not sent:
            return
        assert self._spill is not None
        with self._midway():
            self._spill.settle(sent)

    def _use(self, step: Step, index: int, gradient: Gradient) -> None:
        """Give a gradient to the step that has begun."""
        if not self._is_finite(index, gradient):
            raise self._lose(
                NonFiniteGradientError(
                    f"the gradient of {self._names[index]} is not finite, and parts of the model have been updated "
                    "with others of this backward already: go on from the last commit with penstock.resume, or have "
                    'whole steps skipped with nonfinite="skip"'
                )
            )
        self._used.add(index)
        step.gradients[index] = gradient
        self._counts[index] += 1

    def _is_finite(self, index: int, gradient: Gradient) -> bool:
        if isinstance(gradient, SpilledGradient):
            assert gradient.norm is not None, "of fewer backward passes than there could have been"
            if bool(torch.isfinite(gradient.norm)):
                return True
            assert self._spill is not None
            gradient = self._spill.get(index)  # the norm of large numbers is none, either
        return bool(torch.isfinite(gradient.sum(dtype=torch.float32))) or bool(torch.isfinite(gradient).all())

    def end(self, take: Callable[[], list[Gradient | None]], hypers: Sequence[Any]) -> tuple[Step, list[int]] | None:
        """The end of backward: the step, and the blocks that were not whole, to be submitted.

        Args:
            take: Gives the gradients that were not announced: of fewer passes than there could have been, or put there
                by hand. Whatever has gone to disk is there when it returns.
            hypers: As they are now.

        Returns:
            None where there was no gradient at all.

        Raises:
            UsageError: hyperparameters were changed since the step began.
            NonFiniteGradientError: a gradient is not finite.
            DiskError: one is lost.
        """
        with self._midway():
            rest = take()
        if self._step is None:
            if all(gradient is None for gradient in rest):
                return None
            self._begin()
        step = self._step
        assert step is not None
        if list(hypers) != list(step.hypers):
            raise self._lose(
                UsageError(
                    "a learning rate, or another hyperparameter, was changed between backward and step(), when parts "
                    "of the model had been updated already. Change it after step(), as schedulers do; this run goes "
                    "on from its last commit with penstock.resume"
                )
            )
        for index, gradient in enumerate(rest):
            if gradient is not None:
                self._use(step, index, gradient)
        self._step = None
        self._waiting = {}
        left = sorted({self._blocks[index] for index in self._used} - self._submitted)
        return step, left

    @contextmanager
    def _midway(self) -> Iterator[None]:
        """Bringing gradients to disk: where that fails after something has been updated, the model cannot go on."""
        try:
            yield
        except (DiskError, StallError) as error:
            if self._step is None or self.lost is not None:
                raise  # nothing has been updated with any of them, or it has been said
            if isinstance(error, StallError):
                self._lose(error)
                raise
            raise self._lose(
                DiskError(
                    f"{error}. Parts of the model have been updated with other gradients of this backward already: go "
                    "on from the last commit with penstock.resume"
                )
            ) from error

    def _lose(self, error: PenstockError) -> PenstockError:
        """Note that the model is between two steps, and cannot go on."""
        self.lost = error
        return error
