"""The operations of one forward, numbered; and the same forward again, without those whose results are held.

As torch's selective checkpointing does it, below autograd: the second forward gets the results in their place, makes
the same graph and saves the same tensors. An operation is skipped only if everything up to it was the same as the first
time: the same operations, on results of the same ones, of the same shapes. Else it is carried out, which is never
wrong.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .hold import HeldTensor, Shape

_aten: Final[Any] = torch.ops.aten
_CPU_ATTENTION: Final = _aten._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS: Final = frozenset(
    (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default)
)
NOT_MADE: Final = -1
"""The maker of what was there before, or comes from no numbered operation."""
Signature = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One that made something new of tensors, or changed some."""

    signature: Signature
    """What it is, and of what: the numbers of the operations that made its arguments, shapes and dtypes."""
    outputs: tuple[Shape, ...]
    """How its results lie in their storages; empty where it cannot be skipped."""
    single: bool
    """Whether it gives a tensor, and not several."""
    flops: float
    product: bool


class Numbering:
    """Numbers the operations of one forward that make something new of tensors, or change some. Views have none."""

    def __init__(self) -> None:
        self._makers: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[int, int]]] = {}
        """By address of a storage: the operation that made it, or changed it last, and which of its results it is."""
        self.next = 0

    def inputs(self, args: object) -> list[Tensor]:
        """The tensors that an operation is given."""
        return _strided(tree_leaves(args))

    def signature(self, func: Any, inputs: Sequence[Tensor]) -> Signature:
        """What an operation is told by."""
        return func, tuple((self.maker(each)[0], tuple(each.shape), each.dtype) for each in inputs)

    def maker(self, tensor: Tensor) -> tuple[int, int]:
        """Which operation made a tensor's storage, and as which of its results."""
        storage = tensor.untyped_storage()
        found = self._makers.get(storage._cdata)
        if found is None or found[0]() is not storage:  # another one may lie there now, made by no operation
            return NOT_MADE, 0
        return found[1]

    def note(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> int:
        """The number of an operation, once it has been carried out; NOT_MADE where it gets none."""
        known = {each.untyped_storage()._cdata for each in inputs}
        made = [
            (each.untyped_storage(), place)
            for place, each in enumerate(outputs)
            if each.untyped_storage()._cdata not in known
        ]
        made += [(each.untyped_storage(), 0) for each in _written(func, args, kwargs)]
        number = NOT_MADE
        if inputs and made:
            number, self.next = self.next, self.next + 1
        for storage, place in made:
            self._makers[storage._cdata] = weakref.ref(storage), (number, place)
        return number


class OperationLog(TorchDispatchMode):
    """Notes the operations of a first forward.

    Args:
        is_weight: Whether a tensor is one of the model's own: what is made of those alone is never skipped, since
            autocast may have made it before.
        passed: Waits for what has been started; None not to measure what operations take.
    """

    def __init__(self, is_weight: Callable[[Tensor], bool], passed: Callable[[], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.paused = False
        """Whether what runs is no part of the forward."""
        self.seconds = self.product_s = self.product_flops = 0.0
        """Of all operations; of the products among them, and how much they do."""
        self._is_weight = is_weight
        self._passed = passed
        self._numbering = Numbering()

    def maker(self, tensor: Tensor) -> tuple[int, int]:
        """The operation that made a tensor's storage, and as which of its results."""
        return self._numbering.maker(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out, and note it."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        inputs = self._numbering.inputs((args, kwargs))
        signature = self._numbering.signature(func, inputs)
        begun = time.perf_counter()
        result = func(*args, **kwargs)
        if self._passed is not None:
            self._passed()
            taken = time.perf_counter() - begun
            self.seconds += taken
            if func in _PRODUCTS:
                self.product_s += taken
        results = tree_leaves(result)
        outputs = _strided(results)
        if self._numbering.note(func, args, kwargs, inputs, outputs) == NOT_MADE:
            return result
        skippable = (
            len(outputs) == len(results)
            and isinstance(result, Tensor | tuple)
            and not func._schema.is_mutable  # type: ignore[attr-defined]
            and not _draws(func, args, kwargs)
            and not all(self._is_weight(each) for each in inputs)
        )
        flops = _flops(func, args, kwargs, result, outputs)
        if func in _PRODUCTS:
            self.product_flops += flops
        self.operations.append(
            Operation(
                signature=signature,
                outputs=tuple(Shape.of(each) for each in outputs) if skippable else (),
                single=isinstance(result, Tensor),
                flops=flops,
                product=func in _PRODUCTS,
            )
        )
        return result


class Replay(TorchDispatchMode):
    """The forward again.

    Args:
        operations: Of the first one.
        held: The results of some of them, by number.
        bring: Gives a held tensor.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        held: Mapping[int, Sequence[HeldTensor]],
        bring: Callable[[HeldTensor], Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self.skipped = 0
        self._operations, self._held, self._bring = operations, held, bring
        self._numbering = Numbering()
        self._same = True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out, or give what it gave before."""
        kwargs = kwargs or {}
        if self.paused or not self._same:
            return func(*args, **kwargs)
        numbering = self._numbering
        inputs = numbering.inputs((args, kwargs))
        number = numbering.next
        signature = numbering.signature(func, inputs)
        held = self._held.get(number)
        if held is not None and self._operations[number].signature == signature:
            self.skipped += 1
            outputs = [self._bring(each) for each in held]
            numbering.note(func, args, kwargs, inputs, outputs)
            return outputs[0] if self._operations[number].single else tuple(outputs)
        result = func(*args, **kwargs)
        outputs = _strided(tree_leaves(result))
        if numbering.note(func, args, kwargs, inputs, outputs) != NOT_MADE:
            known = number < len(self._operations) and self._operations[number].signature == signature
            self._same = known
        return result


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _strided(tree_leaves(found))


def _strided(results: Sequence[Any]) -> list[Tensor]:
    return [each for each in results if isinstance(each, Tensor) and each.layout is torch.strided]


def _draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it draws random numbers: those after it would be others if it were skipped."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def _flops(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, outputs: Sequence[Tensor]
) -> float:
    """Operations on numbers: of products and attention as torch counts them, of all else one per element made."""
    if func is _CPU_ATTENTION:
        query, key = args[0], args[1]
        return float(4 * query.numel() * key.shape[-2])
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=result))
    return float(sum(each.numel() for each in outputs))
