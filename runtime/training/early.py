"""Steps that backward begins: a block is submitted as soon as its last gradient is there.

Gradients of blocks that are not whole yet wait in memory, as many as the largest block has. Where more would have to
(experts without tokens leave blocks that never become whole), those that have waited longest go to disk, and come back
beside their shards when `step()` submits what is left. So they do where others of a device apart find no place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from ...kernels.norms import total_norm
from ...memory.errors import DiskError, PenstockError, StallError, UsageError
from .blockchanges import Step
from .gradients import Gradients
from .intake import Gradient, SpilledGradient
from .shards import SMALL
from .updater import Updater

BEHIND: Final = 3
"""Blocks whose gradients wait for their update, before backward waits for that, where there is no room for more."""
BESIDE: Final = 2
"""The same where the cores that compute are those that update: more that wait would not make either end sooner."""
Hypers = Callable[[], Sequence[Any]]
"""Hyperparameters of each parameter, as they are now."""


class NonFiniteGradientError(PenstockError):
    """A gradient is infinite or not a number."""


class EarlySteps:
    """The step that backward has begun, if it has.

    Args:
        names: Of the parameters.
        blocks: Of each parameter.
        counts: How many updates each parameter has had; counted on as gradients come.
        gradients: That come.
        updater: Changes blocks.
        hypers: Asked when a step begins.
        behind: Blocks whose gradients wait for their update, before backward waits for that.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        blocks: Sequence[int],
        counts: list[int],
        gradients: Gradients,
        updater: Updater,
        hypers: Hypers,
        behind: int = BEHIND,
    ) -> None:
        self._names = names
        self._blocks = blocks
        self._counts = counts
        self._gradients = gradients
        self._updater = updater
        self._hypers = hypers
        self._behind = behind
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
        self.norm: torch.Tensor | None = None
        """Of all gradients of the last step that ended, where a device apart has taken it."""
        self.lost: PenstockError | None = None
        """Why the model is between two steps for good."""

    @property
    def begun(self) -> bool:
        """Whether parts of the model may be a step ahead of others."""
        return self._step is not None

    @property
    def waiting_nbytes(self) -> int:
        """Of gradients in memory that could go to disk, in blocks that are not whole."""
        return sum(self._gradients.kept_nbytes(index) for waiting in self._waiting.values() for index in waiting)

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
        self._updater.wait_below(self._behind)
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
        return self._gradients.kept_nbytes(index) if self._gradients.intake.leaves(index) else 0

    def _make_room(self, step: Step, block: int) -> None:
        """Send gradients of other blocks to disk, until no more wait than may."""
        while self.waiting_nbytes > self.hold_nbytes:
            self._send(step, next(other for other in self._waiting if other != block))

    def free_place(self) -> None:
        """A gradient that comes finds no place: one is given back, by a block that has waited longest, or by updates.

        From a device apart places are more than the blocks that may wait for their updates, so some of those that are
        not whole have any, or some of the step before. Where the same cores compute and update, a wait for updates
        costs nothing.
        """
        if self._updater.unfinished and not self._gradients.depart:
            self._updater.wait_below(self._updater.unfinished)
        elif self._step is not None and self._waiting:
            self._send(self._step, next(iter(self._waiting)))
        else:
            self._updater.wait_below(self._behind)

    def _send(self, step: Step, block: int) -> None:
        """Send what waits in memory of a block to disk, and give its place back."""
        with self._midway():
            for index in self._waiting.pop(block):
                gradient = step.gradients[index]
                assert isinstance(gradient, torch.Tensor)
                step.gradients[index] = self._gradients.intake.to_disk(index, gradient)
        self._gradients.intake.release(block)

    def _await_disk(self, step: Step, block: int) -> None:
        """Wait until what has gone to disk of a block is there: its update reads it."""
        sent = [index for index in self._parameters[block] if isinstance(step.gradients[index], SpilledGradient)]
        if not sent:
            return
        with self._midway():
            self._gradients.intake.await_disk(sent)

    def _use(self, step: Step, index: int, gradient: Gradient) -> None:
        """Give a gradient to the step that has begun. Those from a device apart are looked at all together, later."""
        if not self._gradients.depart and not self._is_finite(index, gradient):
            raise self._not_finite(f"the gradient of {self._names[index]}")
        self._used.add(index)
        step.gradients[index] = gradient
        self._counts[index] += 1

    def _is_finite(self, index: int, gradient: Gradient) -> bool:
        if isinstance(gradient, SpilledGradient):
            if bool(torch.isfinite(self._gradients.norm(index, gradient))):
                return True
            gradient = self._gradients.intake.present(index, gradient)  # the norm of large numbers is none, either
        return bool(torch.isfinite(gradient.sum(dtype=torch.float32))) or bool(torch.isfinite(gradient).all())

    def _check_norms(self, rest: Sequence[Gradient | None]) -> None:
        """See that the gradients of the step are finite: all whose norms were taken on the way, and the rest."""
        norms = self._gradients.norms_on_the_way
        for index, gradient in enumerate(rest):
            if gradient is not None:
                norms[index] = self._gradients.norm(index, gradient)
        self.norm = total_norm([norms[index] for index in sorted(norms)]).cpu()  # the one wait for the device
        if not bool(torch.isfinite(self.norm)):
            raise self._not_finite(f"the norm of all gradients is {self.norm.item()}: one of them")

    def _not_finite(self, what: str) -> PenstockError:
        return self._lose(
            NonFiniteGradientError(
                f"{what} is not finite, and parts of the model have been updated with others of this backward "
                "already: go on from the last commit with penstock.resume, or have whole steps skipped with "
                'nonfinite="skip"'
            )
        )

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
        if self._gradients.depart:
            self._check_norms(rest)
        self._step = None
        self._waiting = {}
        left = sorted({self._blocks[index] for index in self._used} - self._submitted)
        return step, left

    @contextmanager
    def _midway(self) -> Iterator[None]:
        """Bringing gradients in: where that fails after something has been updated, the model cannot go on."""
        try:
            yield
        except Exception as error:
            if self._step is None or self.lost is not None or isinstance(error, UsageError):
                raise  # nothing has been updated with any of them, or it has been said
            if isinstance(error, StallError):
                self._lose(error)
                raise
            kind = DiskError if isinstance(error, DiskError) else PenstockError
            raise self._lose(
                kind(
                    f"{error}. Parts of the model have been updated with other gradients of this backward already: go "
                    "on from the last commit with penstock.resume"
                )
            ) from error

    def _lose(self, error: PenstockError) -> PenstockError:
        """Note that the model is between two steps, and cannot go on."""
        self.lost = error
        return error
