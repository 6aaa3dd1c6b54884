"""Modules at work: who runs when, in which thread, inside whom; from torch's forward hooks.

A module that is called while none is running is a root: its `named_modules()` give the paths of all modules in it. Only
modules that are recorded carry hooks, because a hook costs several microseconds wherever the caches are cold. Roots are
found by a global hook, which is there only while modules exist that nobody knows yet: they make themselves known when
they get parameters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .recorder import Recorder
from .schema import NONE, Compute, Phase


class Clock(Protocol):
    """Where the times of a span come from."""

    def begin(self) -> Any:
        """A span starts in the calling thread."""
        ...

    def end(self, begun: Any, done: Callable[[int, int, int], None]) -> None:
        """It ends; `done(launched, start, end)` is called once its times are known, perhaps much later."""
        ...

    def poll(self) -> None:
        """Tell the times that have become known."""
        ...

    def finish(self) -> None:
        """Wait for the times that are not known yet, and tell them."""
        ...


class HostClock:
    """Spans of the host itself: what a CPU computes."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock

    def begin(self) -> int:
        """Now."""
        return self._clock()

    def end(self, begun: int, done: Callable[[int, int, int], None]) -> None:
        """Known at once."""
        done(NONE, begun, self._clock())

    def poll(self) -> None:
        """Nothing is left to tell."""

    def finish(self) -> None:
        """Nothing is left to tell."""


class Listener(Protocol):
    """Who else wants to know of calls: steps, tensors, backward."""

    def root_begins(self, module: nn.Module) -> None:
        """An outermost call starts."""
        ...

    def root_ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An outermost call returned; `result` is None where it raised."""
        ...

    def module_returned(self, row: int, depth: int, args: tuple[Any, ...], result: Any) -> None:
        """A recorded module returned `result` for `args`; `depth` recorded modules are around it."""
        ...


class _Thread(threading.local):
    """What runs in one thread: rows of the recorded modules under way, outermost first, and when they started."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.begun: list[Any] = []
        self.lane = -1


class _Silent:
    """What a saved model has in the place of the watch that was on it."""

    def _before(self, *call: object) -> None:
        """Nothing is recorded."""

    def _after(self, *call: object) -> None:
        """Nothing is recorded."""


class ModuleWatch:
    """Records the spans of modules while it is entered.

    Args:
        every: Whether all modules are recorded, or only layers and what contains them: elements of a ModuleList,
            Sequential or ModuleDict, their parents, and roots.
    """

    def __init__(self, recorder: Recorder, clock: Clock, *, every: bool) -> None:
        self._recorder = recorder
        self._clock = clock
        self._every = every
        self._rows: dict[int, int] = {}
        """By id of a module: its row, or -1 where it is not recorded."""
        self._alive: dict[int, weakref.ref[nn.Module]] = {}
        self._roots = 0
        self._lanes = 0
        self._local = _Thread()
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._handles: list[Any] = []
        self._finder: Any = None
        self._unknown: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Modules that have got parameters since the recording began, and have not been called yet."""
        self._on = False

    def listen(self, listener: Listener) -> None:
        """Tell someone of calls from now on."""
        self._listeners.append(listener)

    def __enter__(self) -> ModuleWatch:
        self._on = True
        self._handles.append(torch_module.register_module_parameter_registration_hook(self._parameter_came))
        return self

    def __exit__(self, *failure: object) -> None:
        self._on = False
        self._find(False)
        while self._handles:
            self._handles.pop().remove()

    def __deepcopy__(self, memo: object) -> ModuleWatch:
        return self  # a program may copy its model, and the hooks with it

    def __reduce__(self) -> tuple[type[_Silent], tuple[()]]:
        return _Silent, ()  # or save it as it is

    def current(self) -> int:
        """The innermost recorded module of the calling thread; -1 for none."""
        rows = self._local.rows
        return rows[-1] if rows else NONE

    def lane(self) -> int:
        """A small number for the calling thread."""
        local = self._local
        if local.lane < 0:
            with self._lock:
                local.lane, self._lanes = self._lanes, self._lanes + 1
        return local.lane

    def row(self, module: nn.Module) -> int:
        """The row of a module that has been seen; -1 for one that has not, or is not recorded."""
        return self._rows.get(id(module), NONE)

    def register(self, root: nn.Module) -> int:
        """Give all modules of a root their rows, once; the root's row."""
        known = self._rows.get(id(root))
        if known is not None and known >= 0:
            return known
        with self._lock:
            self._roots += 1
            prefix = "" if self._roots == 1 else f"{self._roots}:"
        chosen = None if self._every else _layers(root)
        rows: dict[str, int] = {}
        for path, module in root.named_modules():
            self._unknown.discard(module)
            parent = next((rows[above] for above in _above(path) if above in rows), NONE)
            if chosen is None or path in chosen:
                rows[path] = self._recorder.module(path=prefix + path, kind=type(module).__name__, parent=parent)
                self._hook(module)
            self._remember(module, rows.get(path, NONE))
        if not self._unknown:
            self._find(False)
        return rows[""]

    def _hook(self, module: nn.Module) -> None:
        if any(getattr(hook, "__self__", None) is self for hook in module._forward_pre_hooks.values()):
            return  # part of an earlier root, or a copy of one
        self._handles.append(module.register_forward_pre_hook(self._before))
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def nearest(self, root: nn.Module) -> dict[str, int]:
        """For every module path of a registered root: its own row, or that of the nearest recorded module above."""
        found: dict[str, int] = {}
        for path, module in root.named_modules():
            own = self.row(module)
            found[path] = own if own >= 0 else next((found[a] for a in _above(path) if a in found), NONE)
        return found

    def _remember(self, module: nn.Module, row: int) -> None:
        key = id(module)
        self._rows[key] = row
        self._alive[key] = weakref.ref(module, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self._rows.pop(key, None)
        self._alive.pop(key, None)

    # --- finding roots ----------------------------------------------------------------------------------------------

    def _parameter_came(self, module: nn.Module, name: str, parameter: object) -> None:
        if id(module) not in self._rows:
            self._unknown.add(module)
            self._find(True)

    def _find(self, wanted: bool) -> None:
        """Look at every call of the process, or no longer."""
        if wanted and self._finder is None and self._on:
            self._finder = torch_module.register_module_forward_pre_hook(self._look)
        elif not wanted and self._finder is not None:
            finder, self._finder = self._finder, None
            finder.remove()

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._local.rows or torch.compiler.is_compiling() or not self._recorder.alive:
            return
        if self._rows.get(id(module), NONE) < 0:
            self.register(module)
            self._before(module, args)  # hooks that it has got by now are not called any more this time

    # --- spans ------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._on or torch.compiler.is_compiling():
            return
        row = self._rows.get(id(module), NONE)
        if row < 0 or not self._recorder.alive:
            return
        local = self._local
        self._recorder.hooks += 1
        if not local.rows:
            for listener in self._listeners:
                listener.root_begins(module)
        local.rows.append(row)
        local.begun.append(self._clock.begin())

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        local = self._local
        if torch.compiler.is_compiling() or not local.rows or local.rows[-1] != self._rows.get(id(module), NONE):
            return  # it began before the recording
        row = local.rows.pop()
        depth, lane = len(local.rows), self.lane()

        def done(launched: int, start: int, end: int) -> None:
            self._recorder.add(
                Compute(
                    module=row,
                    phase=Phase.FORWARD,
                    start=start,
                    end=end,
                    lane=lane,
                    launched=launched,
                    depth=depth,
                )
            )

        self._clock.end(local.begun.pop(), done)
        if result is not None:
            for listener in self._listeners:
                listener.module_returned(row, depth, args, result)
        if not local.rows:
            for listener in self._listeners:
                listener.root_ends(module, args, kwargs, result)


def _layers(root: nn.Module) -> set[str]:
    """Paths of the modules worth a span of their own when recording must cost next to nothing."""
    chosen = {""}
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            chosen.update(f"{path}.{name}" if path else name for name, _ in module.named_children())
            chosen.update(_above(path))
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                chosen.add(path)
    for name, _ in root.named_children():
        chosen.add(name)
    return chosen


def _above(path: str) -> Iterator[str]:
    """The paths above, nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments or result, also inside tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
