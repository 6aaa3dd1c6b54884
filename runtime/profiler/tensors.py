"""Bytes of weights, buffers, gradients and optimizer states, by module. Tied tensors are counted once, by storage."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .calls import ModuleWatch, is_bare
from .gradients import Whole, WholeGradients
from .guard import harmless
from .holdings import Holdings
from .recorder import Recorder
from .schema import NONE, Category, Tier
from .states import OptimizerStates
from .storages import address, parts_of, storage_key
from .turns import StepTurns


@dataclass(kw_only=True, slots=True, eq=False)
class _Parameter:
    """A parameter of a root that was seen, until it is gone."""

    reference: weakref.ref[torch.Tensor]
    name: str
    row: int
    key: int
    """Where its bytes were when they were counted; 0 where they are not counted here."""
    placed: bool = True
    """Whether its place in a model is known: it is not before the model is called or streamed."""
    address: int = 0
    """Of its first element when its bytes were counted: where that is the same, nothing has moved."""
    gradient: Whole | None = None
    """Its gradient, where that has its memory to itself; others are held by storage."""
    parts: frozenset[int] = frozenset()
    """Storages of a gradient that has not."""
    hook: Any = None


def objects_alive() -> list[Any]:
    """What the collector knows of, without what is dead already."""
    gc.collect()
    return gc.get_objects()


class TensorWatch:
    """Keeps the records of tensors that outlive a step up to date, when it is told to look.

    Args:
        at_once: Whether a gradient is counted as soon as backward has accumulated it, by a hook on every parameter;
            else it is when a root begins, or an optimizer.
        turns: Which steps are looked at whole. In the others only whether gradients are there is looked at, and what
            optimizers keep is not. None: all of them are.
    """

    def __init__(
        self, recorder: Recorder, watch: ModuleWatch, *, at_once: bool, turns: StepTurns | None = None
    ) -> None:
        self._turns = turns
        self._at_once = at_once
        self._recorder = recorder
        self._watch = watch
        self._roots: list[weakref.ref[nn.Module]] = []
        self._elsewhere: set[int] = set()
        """Ids of parameters whose bytes somebody else accounts for."""
        self._holdings = Holdings(recorder)
        self.known = self._holdings.known
        """Storages of weights and buffers: what autograd saves of them is no activation."""
        self._whole = WholeGradients(recorder, at_once=at_once)
        self.states = OptimizerStates(recorder, self._holdings, self._row_of, turns)
        self._parameters: dict[int, _Parameter] = {}
        """By id."""
        self._buffers: dict[int, weakref.ref[torch.Tensor]] = {}
        """By storage."""
        self._newcomers: dict[str, int] = {}
        """By class of a module that no known model contains yet: its row."""
        self._moved: deque[int] = deque()
        """Ids of parameters whose memory is gone; they may have got another."""
        self._registration: Any = register_module_parameter_registration_hook(self._parameter_came)

    def _row_of(self, parameter: torch.Tensor) -> int:
        known = self._parameters.get(id(parameter))
        return known.row if known else NONE

    def leave_out(self, parameters: set[int]) -> None:
        """Parameters, by id, whose bytes are somebody else's to account for, from now on."""
        self._elsewhere |= parameters
        for number in parameters & self._parameters.keys():
            self._drop_weight(self._parameters[number])
            self._drop_gradient(self._parameters[number])

    def leave_out_no_more(self, parameters: set[int]) -> None:
        """They are gone, and other parameters may get their ids."""
        self._elsewhere -= parameters

    @harmless
    def watch_what_is_there(self) -> None:
        """Account for modules and optimizers that the program made before the recording: they are no baseline."""
        objects = objects_alive()
        # isinstance would wake proxies; a module whose __init__ is under way has no parts yet
        modules = [o for o in objects if issubclass(type(o), nn.Module) and getattr(o, "_modules", None) is not None]
        parts = {id(child) for module in modules for child in module.children()}
        roots = [module for module in modules if id(module) not in parts and any(True for _ in module.parameters())]
        for root in sorted(
            roots, key=lambda root: -sum(p.nbytes for p in root.parameters())
        ):  # the largest has no number
            self._watch.register(root)
            self.watch(root)
        self.look_at_gradients(p for known in list(self._parameters.values()) if (p := known.reference()) is not None)
        for thing in objects:
            if issubclass(type(thing), torch.optim.Optimizer):
                self.states.look_at(thing)

    @harmless
    def watch(self, root: nn.Module) -> None:
        """Account for a root's weights and buffers from now on, until they are gone."""
        if is_bare(root) or any(known() is root for known in self._roots):
            return
        named = list(root.named_parameters())
        if any(not isinstance(parameter, nn.Parameter) or is_lazy(parameter) for _, parameter in named):
            return  # not made yet, or others stand in for them during this call (torch.func): the next one may tell
        rows = self._watch.nearest(root)
        self.look_again()
        for name, parameter in named:
            known = self._parameters.get(id(parameter))
            if known is None or not known.placed:
                if known is not None:
                    self._drop_weight(known)
                self._watch_parameter(name, parameter, rows[name.rpartition(".")[0]])
        for name, buffer in root.named_buffers():
            key = self._holdings.take(name, buffer, Category.BUFFER, rows[name.rpartition(".")[0]])
            if key:
                self._buffers[key] = weakref.ref(buffer, functools.partial(self._buffer_gone, key))
        self._roots.append(weakref.ref(root, self._root_gone))

    @harmless
    def _parameter_came(self, module: nn.Module, name: str, parameter: object) -> None:
        """A module gets a parameter: it is counted by the module's class until it is known what model they are of."""
        if type(parameter) is not nn.Parameter or torch.compiler.is_compiling() or not self._recorder.alive:
            return  # other classes need not have memory of their own
        if id(parameter) in self._parameters or not storage_key(parameter):
            return
        self._recorder.hooks += 1
        kind = type(module).__name__
        row = self._newcomers.get(kind)
        if row is None:
            row = self._newcomers[kind] = self._recorder.module(path=f"({kind}, not called yet)", kind=kind)
        self._watch_parameter(name, parameter, row, placed=False)

    def _watch_parameter(self, name: str, parameter: torch.Tensor, row: int, *, placed: bool = True) -> None:
        number = id(parameter)
        reference = weakref.ref(parameter, lambda _: self._parameter_gone(number))
        known = _Parameter(reference=reference, name=name, row=row, key=0, placed=placed)
        self._parameters[number] = known
        if number in self._elsewhere:
            return
        self._take_weight(known, parameter)
        if self._at_once and placed and parameter.requires_grad and parameter.is_leaf:
            hookable: Any = parameter  # torch leaves some of it untyped
            known.hook = hookable.register_post_accumulate_grad_hook(self._gradient_came)

    @harmless
    def look_again(self) -> None:
        """Count what took the place of weights whose memory is gone: they were converted, or went to a device."""
        while True:
            try:
                number = self._moved.popleft()
            except IndexError:  # asked for before, it may be gone by now: the sampler looks too
                return
            known = self._parameters.get(number)
            parameter = None if known is None else known.reference()
            if known is None or parameter is None or known.key or number in self._elsewhere:
                continue
            if parameter.untyped_storage().nbytes() == parameter.nbytes:  # not a piece of something larger
                self._take_weight(known, parameter)

    def _take_weight(self, known: _Parameter, parameter: torch.Tensor) -> None:
        gone = functools.partial(self._storage_gone, id(parameter))
        known.key = self._holdings.take(known.name, parameter, Category.WEIGHT, known.row, gone)

    def holds(self, key: int) -> bool:
        """Whether the storage at this address is counted here."""
        return self._holdings.holds(key) or self._whole.holds(key)

    def _drop_weight(self, known: _Parameter) -> None:
        """A parameter's bytes are no longer counted here."""
        key, known.key = known.key, 0
        if key:
            self._holdings.drop(Category.WEIGHT, key)

    def _storage_gone(self, number: int, key: int, storage: weakref.ref[Any]) -> None:
        held = self._holdings.find(Category.WEIGHT, key)
        if held is None or held.storage is not storage:
            return
        self._holdings.drop(Category.WEIGHT, key)
        known = self._parameters.get(number)
        if known is not None and known.key == key:
            known.key = 0
            self._moved.append(number)

    def _root_gone(self, root: weakref.ref[nn.Module]) -> None:
        self._roots = [known for known in self._roots if known is not root]

    def _parameter_gone(self, number: int) -> None:
        known = self._parameters.pop(number)
        self._drop_weight(known)
        self._drop_gradient(known)

    def _buffer_gone(self, key: int, _: object) -> None:
        self._buffers.pop(key, None)
        self._holdings.drop(Category.BUFFER, key)

    @harmless
    def look_at_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Compare the gradients that are there with those that were there, and weights with where they were.

        Only for parameters that the calling thread computes with: backward exchanges gradients without Python's lock,
        and who reads one of another thread's may read what is gone.
        """
        if self._turns is not None and not self._turns.looking:
            self._pass_gradients_by(parameters)
            return
        self.look_again()
        for parameter in parameters:
            number = id(parameter)
            known = self._parameters.get(number)
            if known is None or number in self._elsewhere:
                continue
            if known.key and known.address != address(parameter):
                self._look_at_weight(known, parameter)
            self._look_at_gradient(known, parameter)

    def _pass_gradients_by(self, parameters: Iterable[torch.Tensor]) -> None:
        changes: Counter[tuple[Tier, int]] = Counter()
        for parameter in parameters:
            number = id(parameter)
            known = self._parameters.get(number)
            if known is None or number in self._elsewhere:
                continue
            if known.parts or not self._whole.pass_by(known, parameter.grad is not None, changes):
                self._look_at_gradient(known, parameter)
        for (tier, row), nbytes in changes.items():
            self._recorder.memory(nbytes, tier, Category.GRADIENT, module=row)

    def _look_at_gradient(self, known: _Parameter, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            self._drop_gradient(known)
        elif self._whole.hold(known, gradient):
            self._drop_parts(known)
        else:
            self._whole.drop(known)
            parts = {storage_key(part): part for part in parts_of(gradient)}
            for key in known.parts - parts.keys():
                self._holdings.drop(Category.GRADIENT, key)
            known.parts = frozenset(parts)
            for part in parts.values():
                self._hold_gradient(parameter, part, known.row)

    def _look_at_weight(self, known: _Parameter, parameter: torch.Tensor) -> None:
        if known.key != storage_key(parameter) and not is_traceable_wrapper_subclass(parameter):
            self._drop_weight(known)  # it has been given other memory, and somebody keeps the old
            self._take_weight(known, parameter)
        known.address = address(parameter)

    def _drop_gradient(self, known: _Parameter) -> None:
        self._whole.drop(known)
        self._drop_parts(known)

    def _drop_parts(self, known: _Parameter) -> None:
        if known.parts:
            for key in known.parts:
                self._holdings.drop(Category.GRADIENT, key)
            known.parts = frozenset()

    @harmless
    def _gradient_came(self, parameter: torch.Tensor) -> None:
        """A gradient has been accumulated (called by the thread that did it)."""
        known = self._parameters.get(id(parameter))
        if known is not None and self._recorder.alive:
            self._recorder.hooks += 1
            self._look_at_gradient(known, parameter)

    def _hold_gradient(self, parameter: torch.Tensor, part: torch.Tensor, row: int) -> None:
        reference = weakref.ref(parameter)

        def right() -> bool:
            owner = reference()
            return owner is not None and owner.grad is not None and part_key in map(storage_key, parts_of(owner.grad))

        part_key = storage_key(part)
        held = self._holdings.find(Category.GRADIENT, part_key)
        if held is not None and held.module == row and held.nbytes == part.untyped_storage().nbytes():
            return
        self._holdings.hold(Category.GRADIENT, part, row, right)

    def close(self) -> None:
        """Take the hooks off."""
        self._registration.remove()
        for known in self._parameters.values():
            if known.hook is not None:
                known.hook.remove()
