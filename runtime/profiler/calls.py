"""Modules at work: who runs when, in which thread, inside whom; from torch's global forward hooks.

Every module of the process is seen, with no wrapping and no change to what it computes. A module that is called while
none is running is a root: its `named_modules()` give the paths of all modules in it.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .guard import harmless
from .recorder import Recorder
from .schema import NONE, Compute, Phase

_CALL: Final = nn.Module._call_impl.__code__
"""What calls hooks: how often it is on the stack is how many modules are under way."""
_OF_GLOBAL_HOOKS: Final = r"Using `torch\.compile\(module\)` when there are global hooks"


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

    def module_returned(self, row: int, depth: int, inputs: Any, result: Any) -> None:
        """A recorded module returned `result` for `inputs`; `depth` recorded modules are around it."""
        ...


class _Call(NamedTuple):
    """A recorded module under way."""

    level: int
    """Modules under way in its thread when it began, itself and those that are not recorded included."""
    row: int
    begun: Any
    root: bool


class _Thread(threading.local):
    """What runs in one thread: the recorded calls under way, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []
        self.calls = 0
        """Modules under way, recorded or not."""
        self.lane = -1


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
        self._root_rows: set[int] = set()
        self._lanes = 0
        self._local = _Thread()
        self._lock = threading.RLock()
        self._bare: dict[str, int] = {}
        """By class of a root that holds nothing (a loss, an activation): its row."""
        self._listeners: list[Listener] = []
        self._handles: list[Any] = []

    def listen(self, listener: Listener) -> None:
        """Tell someone of calls from now on."""
        self._listeners.append(listener)

    def __enter__(self) -> ModuleWatch:
        # What torch says of global hooks where it compiles is no news to us, and none of the program's business.
        warnings.filterwarnings("ignore", message=_OF_GLOBAL_HOOKS, category=UserWarning)
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._before),
            torch_module.register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *failure: object) -> None:
        filters: Any = warnings.filters  # a list, whatever its type says
        filters[:] = [f for f in filters if getattr(f[1], "pattern", "") != _OF_GLOBAL_HOOKS]
        while self._handles:
            self._handles.pop().remove()

    def current(self) -> int:
        """The innermost recorded module of the calling thread; -1 for none."""
        stack = self._local.stack
        return stack[-1].row if stack else NONE

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
        with self._lock:
            known = self._rows.get(id(root))
            if known is not None and known >= 0:
                return known
            row = self._register_bare(root) if is_bare(root) else self._register_all(root)
            self._root_rows.add(row)
        return row

    def _register_bare(self, root: nn.Module) -> int:
        # Programs make these anew for every call: all of a class share a row, or the table would grow with the run.
        kind = type(root).__name__
        row = self._bare.get(kind)
        if row is None:
            row = self._bare[kind] = self._recorder.module(path=f"({kind})", kind=kind)
        self._remember(root, row)
        return row

    def _register_all(self, root: nn.Module) -> int:
        self._roots += 1
        prefix = "" if self._roots == 1 else f"{self._roots}:"
        chosen = None if self._every else _layers(root)
        rows: dict[str, int] = {}
        for path, module in root.named_modules():
            parent = next((rows[above] for above in _above(path) if above in rows), NONE)
            if chosen is None or path in chosen:
                rows[path] = self._recorder.module(path=prefix + path, kind=type(module).__name__, parent=parent)
            self._remember(module, rows.get(path, NONE))
        return rows[""]

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

    @harmless
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return  # what is compiled is not called module by module; the compiled module is a root of its own
        local = self._local
        local.calls += 1
        row = self._rows.get(id(module))
        if local.calls > 1 and (row is None or row in self._root_rows):
            _forget_what_was_interrupted(local)
        inside = local.calls > 1 or torch._C._current_graph_task_id() >= 0  # recomputed by a backward pass
        if row is None:
            if inside or not self._recorder.alive or "_is_replica" in module.__dict__:
                return  # made while its root runs, or a fork's, or DataParallel's: its time is its parent's
            row = self.register(module)
        if row < 0:
            if inside:
                return
            row = self.register(module)  # part of a root, and now called as one
        self._recorder.hooks += 1
        if not inside:
            for listener in self._listeners:
                listener.root_begins(module)
        local.stack.append(_Call(local.calls, row, self._clock.begin(), not inside))

    @harmless
    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if torch.compiler.is_compiling():
            return
        local, stack = self._local, self._local.stack
        if not local.calls:
            return  # it began before the recording
        level, local.calls = local.calls, local.calls - 1
        while stack and stack[-1].level > level:
            stack.pop()
        if not stack or stack[-1].level != level:
            return
        call = stack.pop()
        row, depth, lane = call.row, len(stack), self.lane()

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

        self._clock.end(call.begun, done)
        # Where forward raised, torch leaves the keyword arguments out.
        kwargs, result = rest if len(rest) == 2 else ({}, None)
        if result is not None:
            for listener in self._listeners:
                listener.module_returned(row, depth, (args, kwargs), result)
        if call.root:
            for listener in self._listeners:
                listener.root_ends(module, args, kwargs, result)


def _forget_what_was_interrupted(local: _Thread) -> None:
    """Drop calls that never came back: torch calls no hook where KeyboardInterrupt or SystemExit leaves a forward."""
    count, frame = 0, sys._getframe(1).f_back
    while frame is not None:
        count += frame.f_code is _CALL
        frame = frame.f_back
    if 0 < count < local.calls:
        local.calls = count
        while local.stack and local.stack[-1].level >= count:
            local.stack.pop()


def is_bare(module: nn.Module) -> bool:
    """Whether a module holds no tensor and no other module."""
    return not (module._parameters or module._buffers or module._modules)


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


def tensors_in(value: Any, nesting: int = 8) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments or result, also inside tuples, lists and dicts.

    Other collections are not looked into: reading them may be work, or change them. Neither are long ones of numbers.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and nesting:
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, tuple | list | dict):
                yield from tensors_in(item, nesting - 1)
