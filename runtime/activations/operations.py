"""The operations of one forward, numbered: what they are, what they use, and what they take."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .hold import Shape

_aten: Final[Any] = torch.ops.aten
_CPU_ATTENTION: Final = _aten._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS: Final = frozenset(
    (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default)
)
_SHAPES_ONLY: Final = frozenset(
    (
        _aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
        _aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default,
        _aten.new_empty_strided.default,
    )
)  # fmt: skip
"""Those that look at the shape of what they are given, and not at its values."""
_BLANK: Final = frozenset(
    (
        _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
        _aten.new_empty_strided.default, _aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default,
    )
)  # fmt: skip
"""Those whose results are there to be written to: one used as it is may have been, by what torch does not see."""
_READ: Final[frozenset[Any]] = frozenset((Tensor.tolist,))
_SHARED: Final[frozenset[Any]] = frozenset[Any]((Tensor.numpy, Tensor.__array__))
"""What gives Python the numbers of a tensor, or its memory, without any operation of torch."""
NOT_MADE: Final = -1
"""The maker of what was there before, or comes from no numbered operation."""
Signature = tuple[Any, ...]
Kind = Literal["product", "attention", "other"]
"""What takes about as long per operation on numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One that made something new of tensors, or changed some."""

    signature: Signature
    """What it is, and of what: the numbers of the operations that made its arguments, shapes and dtypes."""
    inputs: tuple[int, ...]
    """Operations whose results it computes with, or has to come after."""
    outputs: tuple[Shape, ...]
    """How its results lie in their storages; empty where it has to be carried out."""
    nbytes: tuple[int, ...]
    """Of these storages."""
    holds: bool
    """Whether its results may be held in its place."""
    single: bool
    """Whether it gives a tensor, and not several."""
    kind: Kind
    flops: float

    @property
    def forced(self) -> bool:
        """Whether it is carried out in every forward: it changes something, draws, or gives what is no new tensor."""
        return not self.outputs


class Numbering:
    """Numbers the operations of one forward that make something new of tensors, or change some. Views have none."""

    def __init__(self) -> None:
        self._makers: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[int, int]]] = {}
        """By address of a storage: the operation that made it, or changed it last, and which of its results it is."""
        self._blank: set[int] = set()
        """Addresses of storages that nothing was written to since they were made."""
        self.next = 0

    def inputs(self, args: object) -> list[Tensor]:
        """The tensors that an operation is given."""
        return strided(tree_leaves(args))

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

    def is_known(self, tensor: Tensor) -> bool:
        """Whether what is in a tensor was written by an operation that was noted."""
        storage = tensor.untyped_storage()
        found = self._makers.get(storage._cdata)
        return found is not None and found[0]() is storage and storage._cdata not in self._blank

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
        blank = func in _BLANK
        for storage, _ in made:
            (self._blank.add if blank else self._blank.discard)(storage._cdata)
        for each in _written(func, args, kwargs):
            made.append((each.untyped_storage(), 0))
            self._blank.discard(each.untyped_storage()._cdata)
        number = NOT_MADE
        if inputs and made:
            number, self.next = self.next, self.next + 1
        for storage, place in made:
            self._makers[storage._cdata] = weakref.ref(storage), (number, place)
        return number


@dataclass(kw_only=True, slots=True)
class Spent:
    """Seconds, and the operations on numbers that were carried out in them."""

    seconds: float = 0.0
    flops: float = 0.0


class OperationLog(TorchDispatchMode):
    """Notes the operations of a first forward.

    Args:
        is_weight: Whether a tensor is one of the model's own: what is made of those alone is never held, since autocast
            may have made it before.
        passed: Waits for what has been started; None not to measure what operations take.
        given: Addresses of storages that the forward is given.
        made: Called with the number and the results of each that could be skipped; None where nobody wants them.
    """

    def __init__(
        self,
        is_weight: Callable[[Tensor], bool],
        passed: Callable[[], None] | None = None,
        *,
        given: Collection[int] = (),
        made: Callable[[int, Sequence[Tensor]], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.paused = False
        """Whether what runs is no part of the forward."""
        self.spent: dict[Kind, Spent] = {"product": Spent(), "attention": Spent(), "other": Spent()}
        """By kind, where it is measured."""
        self.looked_at: set[int] = set()
        """Operations whose results became numbers in Python."""
        self.changed: set[int] = set()
        """Operations whose results were changed in place afterwards."""
        self.views: set[Any] = set()
        """What has no number."""
        self.opaque = False
        """Whether something was used that no operation has written: a kernel or library that torch is not told of has a
        part in it, and what that was given is not known."""
        self._is_weight = is_weight
        self._passed = passed
        self._given = given
        self._made = made
        self._numbering = Numbering()
        self._last_drawn = NOT_MADE

    @property
    def count(self) -> int:
        """How many there have been."""
        return self._numbering.next

    def maker(self, tensor: Tensor) -> tuple[int, int]:
        """The operation that made a tensor's storage, and as which of its results."""
        return self._numbering.maker(tensor)

    def is_read(self, tensor: Tensor, *, shared: bool) -> None:
        """Python has the numbers of a tensor, and where its memory is `shared` may write there."""
        number = self.maker(tensor)[0]
        self.looked_at.add(number)
        if shared:
            self.changed.add(number)

    def source(self, tensor: Tensor) -> int:
        """The operation that wrote what is in a tensor that is used: NOT_MADE where it was there before."""
        if not self._numbering.is_known(tensor):
            there = tensor.untyped_storage()._cdata in self._given or self._is_weight(tensor)
            self.opaque = self.opaque or not there
        return self.maker(tensor)[0]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out, and note it."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        inputs = self._numbering.inputs((args, kwargs))
        signature = self._numbering.signature(func, inputs)
        written = _written(func, args, kwargs)
        changed = {self.maker(each)[0] for each in written}
        self._look(func, inputs, written)
        begun = time.perf_counter()
        result = func(*args, **kwargs)
        if self._passed is not None:
            self._passed()
        taken = time.perf_counter() - begun
        results = tree_leaves(result)
        outputs = strided(results)
        number = self._numbering.note(func, args, kwargs, inputs, outputs)
        if number == NOT_MADE:
            self.views.add(func)
            if not outputs:
                self.looked_at.update(self.maker(each)[0] for each in inputs)
            return result
        self.changed |= changed
        kind = _kind(func)
        flops = _flops(func, args, kwargs, result, outputs)
        if self._passed is not None:
            self.spent[kind].seconds += taken
            self.spent[kind].flops += flops
        draws = _draws(func, args, kwargs)
        whole = len(outputs) == len(results) and isinstance(result, Tensor | tuple)
        new = whole and not func._schema.is_mutable and not draws  # type: ignore[attr-defined]
        holds = new and not all(self._is_weight(each) for each in inputs)
        self.operations.append(
            Operation(
                signature=signature,
                inputs=self._uses(func, signature, draws=draws),
                outputs=tuple(Shape.of(each) for each in outputs) if new else (),
                nbytes=tuple(each.untyped_storage().nbytes() for each in outputs) if new else (),
                holds=holds,
                single=isinstance(result, Tensor),
                kind=kind,
                flops=flops,
            )
        )
        if draws:
            self._last_drawn = number
        if holds and self._made is not None:
            self._made(number, outputs)
        return result

    def _look(self, func: Any, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """See where what an operation uses comes from."""
        if func.is_view or func in _SHAPES_ONLY:
            return
        own = {each.untyped_storage()._cdata for each in written}
        for each in inputs:
            if each.untyped_storage()._cdata not in own:
                self.source(each)

    def _uses(self, func: Any, signature: Signature, *, draws: bool) -> tuple[int, ...]:
        """The operations before one that it depends on: of two that draw, on the first."""
        found = set() if func in _SHAPES_ONLY else {maker for maker, _, _ in signature[1]}
        if draws:
            found.add(self._last_drawn)
        return tuple(sorted(found - {NOT_MADE}))


class Reads(TorchFunctionMode):
    """Tells a log of what Python reads of tensors of the CPU on ways that are no operations: `tolist`, numpy.

    Lengths that a sequence is split by come to Python so; made again, they have to be numbers.
    """

    def __init__(self, log: OperationLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, and note what it is given."""
        if (func in _READ or func in _SHARED) and not self._log.paused and args[0].layout is torch.strided:
            self._log.is_read(args[0], shared=func in _SHARED)
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return strided(tree_leaves(found))


def strided(results: Sequence[Any]) -> list[Tensor]:
    """The tensors among results, but for sparse ones."""
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


def _kind(func: Any) -> Kind:
    if func in _PRODUCTS:
        return "product"
    return "attention" if func is _CPU_ATTENTION or func._overloadpacket in flop_registry else "other"


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
