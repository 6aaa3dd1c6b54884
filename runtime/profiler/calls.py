"""Modules at work: who runs when, in which thread, inside whom; from torch's forward hooks.

A module that is called while none is running is a root: its `named_modules()` give the paths of all modules in it. Only
modules that are recorded carry hooks, because a hook costs many microseconds wherever the caches are cold; the elements
of long stacks carry them only in some of their root's calls (`Turns`), or, while gradients are on, in some steps: a
backward pass, and the activations it waits for, are told by the modules of its forward. Where every module is recorded,
all those within such elements take turns with them.

Roots are found by a global hook. Where only layers are recorded it is there only while modules exist that nobody knows
yet: they make themselves known when they get parameters.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .clocks import Clock
from .guard import harmless
from .hooks import ModuleHooks
from .paths import above, is_element, layers
from .recorder import Recorder
from .schema import NONE, Phase
from .spans import Spanned
from .turns import EVERY_COLD_NS, EVERY_SHARE, StepTurns, Turns

_CALL: Final = nn.Module._call_impl.__code__
"""What calls hooks: it is on the stack once for every module under way."""
_OURS: Final = "penstock-"
"""How names of penstock's own threads begin. They call no modules,"""
_COMPUTING: Final = ("penstock-lane", "penstock-throughput")
"""but for these."""
_OF_GLOBAL_HOOKS: Final = r"Using `torch\.compile\(module\)` when there are global hooks"


class Listener(Protocol):
    """Who else wants to know of calls: steps, tensors, backward."""

    def root_begins(self, module: nn.Module) -> None:
        """An outermost call starts."""
        ...

    def root_ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An outermost call returned; `result` is None where it raised."""
        ...


Returned = Callable[[int, int, Any, Any], None]
"""A recorded module, by its row, with so many recorded modules around it, made of these inputs this result."""


class _Call(NamedTuple):
    """A recorded module under way."""

    module: int
    """Its id."""
    row: int
    begun: Any
    root: bool
    at: int
    """When it began, on the host's clock; 0 where it is no root."""


class _Stack(NamedTuple):
    """The layers of one root that are recorded by turns."""

    turns: Turns
    layers: list[weakref.ref[nn.Module]]


class _Thread(threading.local):
    """What runs in one thread: the recorded calls under way, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []
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
        steps: Whether the modules of long stacks are recorded in the step under way, while gradients are on. None: all
            of its calls take turns.
    """

    def __init__(self, recorder: Recorder, clock: Clock, *, every: bool, steps: StepTurns | None = None) -> None:
        self._recorder = recorder
        self._clock = clock
        self._every = every
        self._steps = steps
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
        self._of_results: list[Returned] = []
        self._of_graphs: list[Returned] = []
        self._hooks = ModuleHooks(self._before, self._after)
        """On modules that are recorded."""
        self._stacks: dict[int, _Stack] = {}
        """By row of a root."""
        self._registration: Any = None
        self._finder: Any = None
        self._unknown: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Modules that have got parameters since the recording began, and have not been called yet."""
        self._on = False

    def listen(self, listener: Listener) -> None:
        """Tell someone of calls from now on."""
        self._listeners.append(listener)

    def listen_to_results(self, returned: Returned) -> None:
        """Tell someone of what modules return, from now on."""
        self._of_results.append(returned)

    def listen_to_graphs(self, returned: Returned) -> None:
        """The same, but only while gradients are on."""
        self._of_graphs.append(returned)

    def __enter__(self) -> ModuleWatch:
        # What torch says of global hooks where it compiles is no news to us, and none of the program's business.
        warnings.filterwarnings("ignore", message=_OF_GLOBAL_HOOKS, category=UserWarning)
        self._on = True
        self._registration = torch_module.register_module_parameter_registration_hook(self._parameter_came)
        self._hooks.__enter__()
        self._find(self._every)
        return self

    def __exit__(self, *failure: object) -> None:
        filters: Any = warnings.filters  # a list, whatever its type says
        filters[:] = [f for f in filters if getattr(f[1], "pattern", "") != _OF_GLOBAL_HOOKS]
        self._on = False
        self._registration.remove()
        if self._finder is not None:
            self._finder.remove()
        self._hooks.__exit__(*failure)

    def __deepcopy__(self, memo: object) -> ModuleWatch:
        return self  # a program may copy its model, and the hooks with it

    def __reduce__(self) -> tuple[type[_Silent], tuple[()]]:
        return _Silent, ()  # or save it as it is

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
            if not self._unknown:
                self._find(self._every)
        return row

    def _register_bare(self, root: nn.Module) -> int:
        # Programs make these anew for every call: all of a class share a row, or the table would grow with the run.
        kind = type(root).__name__
        row = self._bare.get(kind)
        if row is None:
            row = self._bare[kind] = self._recorder.module(path=f"({kind})", kind=kind)
        self._remember(root, row)
        self._hooks.put(root)
        return row

    def _register_all(self, root: nn.Module) -> int:
        self._roots += 1
        prefix = "" if self._roots == 1 else f"{self._roots}:"
        chosen = None if self._every else layers(root)
        rows: dict[str, int] = {}
        by_turns: list[weakref.ref[nn.Module]] = []
        elements: set[str] = set()
        for path, module in root.named_modules():
            self._unknown.discard(module)
            parent = next((rows[up] for up in above(path) if up in rows), NONE)
            if chosen is None or path in chosen:
                kind, sampled = type(module).__name__, is_element(root, path)
                rows[path] = self._recorder.module(path=prefix + path, kind=kind, parent=parent, sampled=sampled)
                self._hooks.put(module)
                if sampled:
                    elements.add(path)
                if sampled or (self._every and not elements.isdisjoint(above(path))):
                    by_turns.append(weakref.ref(module))
            self._remember(module, rows.get(path, NONE))
        if by_turns:
            count = len(by_turns)
            turns = Turns(count, cold_ns=EVERY_COLD_NS, share=EVERY_SHARE) if self._every else Turns(count)
            self._stacks[rows[""]] = _Stack(turns, by_turns)
        return rows[""]

    def _take_turn(self, stack: _Stack) -> None:
        """Let the layers of a root that is about to run carry hooks, or none."""
        by_steps = self._steps is not None and torch.is_grad_enabled()
        wanted = self._steps.looking if self._steps is not None and by_steps else stack.turns.next()
        if not wanted and _is_alone():
            self._find(False)  # it would look at every module, and who is called within a root is none; see `_after`
        for known in stack.layers:
            layer = known()
            if layer is not None:
                self._hooks.turn(layer, wanted)

    def nearest(self, root: nn.Module) -> dict[str, int]:
        """For every module path of a registered root: its own row, or that of the nearest recorded module above."""
        found: dict[str, int] = {}
        for path, module in root.named_modules():
            own = self.row(module)
            found[path] = own if own >= 0 else next((found[a] for a in above(path) if a in found), NONE)
        return found

    def _remember(self, module: nn.Module, row: int) -> None:
        key = id(module)
        self._rows[key] = row
        self._alive[key] = weakref.ref(module, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self._rows.pop(key, None)
        self._alive.pop(key, None)
        self._hooks.forget(key)

    # --- finding roots ----------------------------------------------------------------------------------------------

    @harmless
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

    @harmless
    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        row = self._rows.get(id(module))
        if (row is not None and row >= 0) or _is_not_run() or not self._recorder.alive:
            return
        if isinstance(module, torch.jit.ScriptModule):
            return  # it cannot carry hooks
        if self._local.stack:
            self._forget_what_was_interrupted(module)
        if self._local.stack or torch._C._current_graph_task_id() >= 0 or "_is_replica" in module.__dict__:
            return  # made while its root runs, or DataParallel's, or recomputed by a backward pass
        hooked = self._hooks.are_on(module)
        self.register(module)
        if not hooked:
            self._before(module, args)  # hooks that it has only now are not called any more this time

    # --- spans ------------------------------------------------------------------------------------------------------

    @harmless
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._on or _is_not_run() or not self._recorder.alive:
            return  # what is compiled is not called module by module; the compiled module is a root of its own
        stack = self._local.stack
        row = self._rows.get(id(module))
        if stack and (row is None or row in self._root_rows):
            self._forget_what_was_interrupted(module)
        inside = bool(stack) or torch._C._current_graph_task_id() >= 0  # recomputed by a backward pass
        if row is None and not inside:
            row = self.register(module)  # a copy of a recorded module, with its hooks
        if row is None or row < 0:
            return
        self._recorder.hooks += 1
        if not inside:
            for listener in self._listeners:
                listener.root_begins(module)
            if row in self._stacks:
                self._take_turn(self._stacks[row])
        stack.append(_Call(id(module), row, self._clock.begin(), not inside, 0 if inside else self._recorder.clock()))

    @harmless
    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if torch.compiler.is_compiling():
            return  # before all else: what is read while compiling is guarded, and compiled anew for each value
        # Between the operations of a large model nothing of this is in the processor's caches: every step counts.
        stack, key = self._local.stack, id(module)
        if not stack or stack[-1].module != key:
            if all(call.module != key for call in reversed(stack)):
                return  # it began before the recording
            while stack[-1].module != key:
                stack.pop()
        call = stack.pop()
        depth = len(stack)
        self._clock.end(call.begun, Spanned(self._recorder, call.row, Phase.FORWARD, self.lane(), depth))
        # Where forward raised, torch leaves the keyword arguments out.
        kwargs, result = rest if len(rest) == 2 else ({}, None)
        if result is not None:
            for returned in self._of_results:
                returned(call.row, depth, (args, kwargs), result)
            if torch.is_grad_enabled():
                for returned in self._of_graphs:
                    returned(call.row, depth, (args, kwargs), result)
        if call.root:
            if self._every or self._unknown:
                self._find(True)
            if call.row in self._stacks:
                self._stacks[call.row].turns.took(self._recorder.clock() - call.at)
            for listener in self._listeners:
                listener.root_ends(module, args, kwargs, result)

    def _forget_what_was_interrupted(self, calling: nn.Module) -> None:
        """Drop calls that never came back: torch calls no hook where KeyboardInterrupt or SystemExit leaves one."""
        there: Counter[int] = Counter()
        frame = sys._getframe(1).f_back
        while frame is not None:
            if frame.f_code is _CALL:
                there[id(frame.f_locals["self"])] += 1
            frame = frame.f_back
        there[id(calling)] -= 1  # this call is not on the stack yet
        stack = self._local.stack
        while stack and sum(call.module == stack[-1].module for call in stack) > there[stack[-1].module]:
            stack.pop()


def _is_alone() -> bool:
    """Whether no other thread can call a module: there are none but penstock's own."""
    own, names = threading.get_ident(), ((thread.ident, thread.name) for thread in threading.enumerate())
    return all(ident == own or (name.startswith(_OURS) and not name.startswith(_COMPUTING)) for ident, name in names)


def _is_not_run() -> bool:
    """Whether what is called is only looked at, to be compiled: sizes are no numbers then."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_bare(module: nn.Module) -> bool:
    """Whether a module holds no tensor and no other module."""
    return not (module._parameters or module._buffers or module._modules)
