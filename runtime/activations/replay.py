"""The forward of a part of a model again, without the operations whose results are held or not wanted.

As torch's selective checkpointing does it, below autograd: the second forward gets the results in their place, makes
the same graph and saves the same tensors. Of what is not held, only that is carried out which backward wants, or which
that is made of; the results of all else are tensors of the same shapes with nothing in them, which nothing that is
carried out looks at.

An operation is left out only if everything up to it was the same as the first time: the same operations, on results of
the same ones, of the same shapes. If one is not, all are carried out from there on; where some had been left out
before, the forward has to begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...memory.arena import debug_enabled
from .hold import HeldTensor, Shape
from .operations import NOT_MADE, Numbering, Operation, OperationLog, strided


class DivergedError(Exception):
    """The forward did something else than the first time, after operations had been left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerun:
    """What of a forward is carried out again."""

    operations: Sequence[Operation]
    """Of the first one."""
    held: Mapping[int, Sequence[HeldTensor]]
    """Results that are given in the place of operations, by number."""
    left_out: frozenset[int]
    """Operations whose results nothing looks at."""
    views: frozenset[Any]
    """What has no number: it made no new storage of what it was given."""

    @property
    def changed(self) -> bool:
        """Whether a result that would be given has been changed in place since: of those that backward has no use for,
        nobody else minds that."""
        return any(each.witness.changed for results in self.held.values() for each in results)


def rerun(log: OperationLog, held: Mapping[int, Sequence[HeldTensor]], wanted: Collection[int], *, until: int) -> Rerun:
    """Work out what a second forward has to do.

    Args:
        log: Of the first one.
        held: The results of some operations, as they were when they were made.
        wanted: Operations whose results backward wants.
        until: Operations before the last thing that it wants is made.
    """
    operations = log.operations[:until]
    if log.opaque:
        given = {number: each for number, each in held.items() if number < until}
        return Rerun(operations=operations, held=given, left_out=frozenset(), views=frozenset(log.views))
    forced = [number for number, each in enumerate(operations) if each.forced]
    left = [number for number in (*forced, *wanted, *log.looked_at) if 0 <= number < until]
    carried: set[int] = set()
    given = {}
    while left:
        number = left.pop()
        if number in held:
            given[number] = held[number]
        elif number not in carried:
            carried.add(number)
            left += operations[number].inputs
    left_out = frozenset(range(until)) - carried - given.keys()
    return Rerun(operations=operations, held=given, left_out=left_out, views=frozenset(log.views))


class Replay(TorchDispatchMode):
    """The forward again.

    Args:
        plan: What of it.
        bring: Gives a held tensor.
    """

    def __init__(self, plan: Rerun, bring: Callable[[HeldTensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self.skipped = 0
        """Operations that were not carried out."""
        self._plan, self._bring = plan, bring
        self._numbering = Numbering()
        self._same = True
        self._incomplete = False
        """Whether some results have nothing in them."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out, or give what it gave before, or nothing of the same shape.

        Raises:
            DivergedError: it is another one than it was, and is given what has nothing in it, for all that is known.
        """
        kwargs = kwargs or {}
        if self.paused or not self._same:
            return func(*args, **kwargs)
        numbering, plan = self._numbering, self._plan
        inputs = numbering.inputs((args, kwargs))
        number = numbering.next
        signature = numbering.signature(func, inputs)
        known = number < len(plan.operations) and plan.operations[number].signature == signature
        if known and (number in plan.held or number in plan.left_out):
            outputs = self._outputs(number, inputs)
            self.skipped += 1
            numbering.note(func, args, kwargs, inputs, outputs)
            return outputs[0] if plan.operations[number].single else tuple(outputs)
        if not known and func not in plan.views and any(numbering.maker(each)[0] in plan.left_out for each in inputs):
            raise DivergedError
        result = func(*args, **kwargs)
        outputs = strided(tree_leaves(result))
        if numbering.note(func, args, kwargs, inputs, outputs) != NOT_MADE and not known:
            self._same = False
            if self._incomplete:
                raise DivergedError
        return result

    def _outputs(self, number: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        held = self._plan.held.get(number)
        if held is not None:
            return [self._bring(each) for each in held]
        self._incomplete = True
        operation = self._plan.operations[number]
        device = inputs[0].device
        return [_empty(shape, size, device) for shape, size in zip(operation.outputs, operation.nbytes, strict=True)]


def _empty(shape: Shape, nbytes: int, device: torch.device) -> Tensor:
    """A tensor with nothing in it: where bugs are looked for, with what shows in whatever is made of it."""
    made = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if debug_enabled():
        made.fill_(0xFF)  # not a number, in each floating dtype
    return shape.on(made.untyped_storage())
