"""What an optimizer computes with: tensors that live within its step, seen by a dispatch mode while it steps.

A dispatch mode is told of every operation, and costs some microseconds for each: the step of an optimizer has few, on
large tensors. Where a step computes the loss anew, nothing is looked at: it would be a forward and a backward.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch.utils import _python_dispatch

from .flights import Flights
from .recorder import Recorder
from .schema import Category
from .storages import tensors_in

_dispatch: Final[Any] = _python_dispatch  # torch leaves some of it untyped


class _Operations(_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """Passes every operation on as it is, and tells what it made."""

    def __init__(self, recorder: Recorder, flights: Flights, row: int, local: _Thread) -> None:
        super().__init__()
        self._recorder, self._flights, self._row, self._local = recorder, flights, row, local

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile need not care: nothing is computed in another way."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        since = self._recorder.clock()
        result = function(*args, **(kwargs or {}))
        if self._recorder.alive and self._flights.looking and self._local.mode is self:
            self._flights.see(tensors_in(result), Category.OPTIMIZER, self._row, since)
        return result


class _Thread(threading.local):
    """What is looked at in one thread."""

    def __init__(self) -> None:
        self.mode: _Operations | None = None


class TemporaryWatch:
    """Looks at the steps of optimizers that it is told of. One at a time in a thread: the outermost."""

    def __init__(self, recorder: Recorder, flights: Flights) -> None:
        self._recorder = recorder
        self._flights = flights
        self._local = _Thread()

    def __enter__(self) -> TemporaryWatch:
        return self

    def __exit__(self, *failure: object) -> None:
        self.ends()

    def begins(self, row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer is about to step in this thread, called with these arguments, itself the first."""
        self.ends()  # one that raised told nobody
        if not self._flights.looking or torch.compiler.is_compiling():
            return
        if any(map(callable, (*args[1:], *kwargs.values()))):
            return
        self._local.mode = _Operations(self._recorder, self._flights, row, self._local)
        self._local.mode.__enter__()

    def ends(self) -> None:
        """It has stepped, or it runs a model, or nothing of it can be under way any more."""
        mode, self._local.mode = self._local.mode, None
        if mode is None:
            return
        stack = _dispatch._get_current_dispatch_mode_stack()
        if stack and stack[-1] is mode:  # else it stays where it is, passes on what it is given, and says nothing
            mode.__exit__(None, None, None)
