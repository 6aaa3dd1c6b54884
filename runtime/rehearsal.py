"""Running a model on tensors that have shapes and no bytes, and noting what each of them would take.

The model's own code runs, forward and backward, so that any architecture is measured as it is and no formula can be out
of date. Tensors are torch's fake ones: they take the kernels' paths for a CPU and hold no memory.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging as transformers_logging

from ..scheduler.tape import Tape

MOST_OPERATIONS: Final = 80_000
"""Some seconds' worth. A training step of 126 layers takes about 30 000, with checkpointing 50 000."""
MOST_PER_LAYER: Final = 2000
"""Of one forward of one layer. Most take 100 to 300; what takes more loops over its tokens in Python."""


class TooLongError(Exception):
    """A rehearsal took more than `MOST_OPERATIONS` or `MOST_PER_LAYER` operations."""


class Watch(TorchDispatchMode):
    """Writes every storage that an operation makes on a tape, and that it is freed when it is."""

    def __init__(self, tape: Tape, *, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._on_cpu = on_cpu
        self.unit = ""
        """The module at work, as `units` calls it."""
        self.asked = False
        """Whether a yes-or-no question about values came up. The answer is no."""
        self.recording = True
        """Whether what is made goes on the tape at once. What is made meanwhile can be noted later."""
        self._makers: dict[int, str] = {}
        """Units that made storages while nothing was recorded."""
        self._left = MOST_OPERATIONS
        self._left_inside = 0
        self._pieces: dict[int, int] = {}
        """Numbers on the tape by storage."""
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._standing: dict[int, Any] = {}
        """Storages that were there before: held here, so that no other one gets their address."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it returns."""
        if func is torch.ops.prim.device.default:  # asked from places that cannot bear an exception
            return func(*args, **(kwargs or {}))
        self._left -= 1
        self._left_inside -= 1
        if not self._left or (self.unit and not self._left_inside):  # once: what is torn down then must not fail
            raise TooLongError
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            self.asked = True  # a layer that is dropped at random, a mask that may hide nothing
            return False
        if func is torch.ops.aten._grouped_mm.default:
            result: Any = grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                if self.recording:
                    self.note(leaf)
                else:
                    self._makers[leaf.untyped_storage()._cdata] = self.unit
        if self._on_cpu and self.recording and func is torch.ops.aten.bmm.default:
            self.tape.give(self.tape.take(sum(_copied_nbytes(operand) for operand in args), self.unit))
        return result

    def enter(self, unit: str) -> None:
        """A module begins, or with "" ends."""
        self.unit = unit
        self._left_inside = MOST_PER_LAYER

    def leave_out(self, module: nn.Module) -> None:
        """Do not count what a module holds already."""
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            self._standing[storage._cdata] = storage

    def note(self, tensor: Tensor) -> int | None:
        """The number of a tensor's piece, which is taken now if it is new; None where the tensor is not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._standing:
            return None
        number = self._pieces.get(key)
        if number is None:
            unit = self._makers.pop(key, self.unit)
            number = self._pieces[key] = self.tape.take(storage.nbytes(), unit)
            self._refs[key] = weakref.ref(storage, partial(self._freed, key, number))
        return number

    def _freed(self, key: int, number: int, _: weakref.ref[Any]) -> None:
        del self._pieces[key], self._refs[key]
        self.tape.give(number)


def _copied_nbytes(operand: Tensor) -> int:
    """Bytes of the copy that oneDNN's product of 16-bit matrices makes of an operand which is not dense. It is large
    where logits of the last position only are wanted: the head's weights are then expanded to the batch."""
    _, rows, columns = operand.shape
    dense = operand.is_contiguous() or operand.stride() == (rows * columns, 1, rows)
    return 0 if dense or operand.element_size() != 2 else operand.numel() * 2


def grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape of torch._grouped_mm's result. Its fake one refuses all but bfloat16, which the CPU does not."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    rows = a.shape[:-1] if a.dim() == b.dim() else a.shape[-2:-1]
    return a.new_empty(*rows, b.shape[-1])


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what torch and models say about tensors that have no values, and about kernels that are not installed."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    level, verbosity = fake.level, transformers_logging.get_verbosity()
    fake.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fake.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def rehearsing(model: nn.Module, tape: Tape, *, on_cpu: bool) -> Iterator[Watch]:
    """In this context tensors are fake, and what a model with fake weights does is written on the tape; with `on_cpu`
    also the large buffers that kernels of the CPU take.

    The tape is closed when the context ends: what is freed later is not on it.
    """
    watch = Watch(tape, on_cpu=on_cpu)
    watch.leave_out(model)
    hooks = []
    for path, module in units(model):
        name = pattern(path)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name)))
        hooks.append(module.register_forward_hook(lambda *_: watch.enter(""), always_call=True))
    try:
        with mode_of(model), watch:
            yield watch
    finally:
        watch.recording = False
        watch._refs.clear()
        for hook in hooks:
            hook.remove()


def mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode that a model's fake tensors belong to."""
    return next(model.parameters()).fake_mode  # type: ignore[no-any-return, attr-defined]


def make_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake tensor on the CPU; ties stay ties."""
    mode = FakeTensorMode()
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    kept: list[Tensor] = []  # an id is reused when its tensor is freed
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def tensors_in(value: object, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor that a cache holds, whatever its class: in attributes, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        inner: Any = ()
        if isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, list | tuple):
            inner = value
        elif hasattr(value, "__dict__"):
            inner = vars(value).values()
        for each in inner:
            yield from tensors_in(each, depth - 1)


def units(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that sizes are shown of, in order: the layers of every stack, and the largest modules without any."""
    if isinstance(model, nn.ModuleList):
        for name, child in model.named_children():
            yield f"{path}.{name}" if path else name, child
    elif not any(isinstance(module, nn.ModuleList) for module in model.modules()):
        yield path, model
    else:
        for name, child in model.named_children():
            yield from units(child, f"{path}.{name}" if path else name)


def pattern(path: str) -> str:
    """What all layers of a stack have in common: model.layers.7 is model.layers.*"""
    return ".".join("*" if part.isdecimal() else part for part in path.split(".")) or "(root)"
