"""What autograd saves between forward and backward, by module, from saved-tensor hooks.

The hooks hand out what they were given: nothing is copied or moved. torch applies only the innermost pair of hooks, so
what a program's own hooks save (checkpointing, save_on_cpu) is theirs, and not seen here; nor is what threads save that
run beside the one that records. A parameter that a custom autograd function saves comes back as a tensor without the
attributes that a program may have put on it: torch makes it anew where there are hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch

from ..saved import SavedTensor
from .calls import ModuleWatch
from .guard import harmless
from .recorder import Recorder
from .schema import Category, Tier
from .storages import storage_key, tier_of
from .tensors import TensorWatch
from .turns import StepTurns

_autograd: Final[Any] = torch._C._autograd  # torch leaves some of it untyped


class _Held:
    """A storage that autograd holds: counted for as long as a saved tensor refers to this."""

    __slots__ = ("__weakref__", "_nbytes", "_recorder", "_row", "_tier")

    def __init__(self, recorder: Recorder, key: int, tier: Tier, nbytes: int, row: int) -> None:
        self._recorder, self._tier, self._nbytes, self._row = recorder, tier, nbytes, row
        recorder.memory(nbytes, tier, Category.ACTIVATION, module=row, key=key)

    def __del__(self) -> None:
        self._recorder.memory(-self._nbytes, self._tier, Category.ACTIVATION, module=self._row)


class _Saved(SavedTensor):
    """A saved tensor, and the count of its storage."""

    __slots__ = ("_held",)

    def hold(self, held: _Held) -> None:
        """Keep the count for as long as the tensor."""
        self._held = held


class ActivationWatch:
    """Counts the tensors that the entering thread saves while it is entered.

    Args:
        steps: Whether it does so in the step under way.
    """

    def __init__(self, recorder: Recorder, watch: ModuleWatch, tensors: TensorWatch, steps: StepTurns) -> None:
        self._recorder = recorder
        self._watch = watch
        self._tensors = tensors
        self._steps = steps
        self._thread = threading.get_ident()
        self._pushed = False
        """Whether our hooks are among those of this thread."""
        self._live: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()
        """By storage."""
        self._closed = False
        self._entered = ExitStack()

    def __enter__(self) -> ActivationWatch:
        with ExitStack() as entered:
            self._push()
            entered.callback(self._pop)
            entered.enter_context(self._out_of_the_way())
            self._recorder.on_step.append(self.step_begins)
            entered.callback(self._recorder.on_step.remove, self.step_begins)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._closed = True
        self._entered.close()

    def holds(self, key: int) -> bool:
        """Whether autograd has saved the storage at this address."""
        return key in self._live

    @harmless
    def step_begins(self) -> bool:
        """Put the hooks on, or take them off, for the step that begins. That takes no time.

        Where the program has hooks of its own at this moment, or allows none, ours stay as they are.
        """
        if threading.get_ident() != self._thread or torch.compiler.is_compiling():
            return False
        if self._pushed and not self._steps.looking:
            self._pop()
        elif not self._pushed and self._steps.looking and self._may_push():
            self._push()
        return False

    def _may_push(self) -> bool:
        allowed = _autograd._saved_tensors_hooks_get_disabled_error_message() is None
        return allowed and _autograd._top_saved_tensors_default_hooks(True) is None

    def _push(self) -> None:
        _autograd._push_saved_tensors_default_hooks(self._pack, SavedTensor.unpack)
        self._pushed = True

    def _pop(self) -> bool:
        """Whether our hooks were the innermost ones of this thread: others are not ours to take off."""
        top = _autograd._top_saved_tensors_default_hooks(True)
        if top is None or top[0] != self._pack:
            return False
        _autograd._pop_saved_tensors_default_hooks()
        self._pushed = False
        return True

    @contextmanager
    def _out_of_the_way(self) -> Iterator[None]:
        """Take our hooks off where somebody switches hooks off: torch.func does, and raises where there are any."""
        graph = torch.autograd.graph
        switch_off = graph.disable_saved_tensors_hooks

        @contextmanager
        def without_ours(error_message: str) -> Iterator[None]:
            mine = not torch.compiler.is_compiling() and self._pop()
            try:
                with switch_off(error_message):
                    yield
            finally:
                if mine:
                    self._push()

        graph.disable_saved_tensors_hooks = without_ours
        try:
            yield
        finally:
            if graph.disable_saved_tensors_hooks is without_ours:
                graph.disable_saved_tensors_hooks = switch_off

    def _pack(self, tensor: torch.Tensor) -> Any:
        saved = _Saved(tensor)
        if not self._closed:
            try:
                self._count(tensor, saved)
            except Exception as error:  # autograd wants its answer all the same
                self._recorder.failed(error)
        return saved

    def _count(self, tensor: torch.Tensor, saved: _Saved) -> None:
        self._recorder.hooks += 1
        key = storage_key(tensor)
        if not key or key in self._tensors.known:
            return
        held = self._live.get(key)
        if held is None:
            nbytes = tensor.untyped_storage().nbytes()
            held = self._live[key] = _Held(self._recorder, key, tier_of(tensor), nbytes, self._watch.current())
        saved.hold(held)
