"""The forward hooks of modules that are recorded: put on, taken off, and kept from what torch compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ModuleHooks:
    """A pair of hooks on each of some modules.

    Args:
        before: A method. Whatever carries a method of the same object is taken for hooked: copies of a module carry
            the hooks of the original.
        after: Likewise.
    """

    def __init__(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self._before = before
        self._after = after
        self._owner = getattr(before, "__self__", None)
        self._handles: dict[int, tuple[Any, Any]] = {}
        """By id of a module."""

    def __enter__(self) -> ModuleHooks:
        self._script, torch.jit.script = torch.jit.script, self._scripted
        return self

    def __exit__(self, *failure: object) -> None:
        if torch.jit.script == self._scripted:
            torch.jit.script = self._script
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def put(self, module: nn.Module) -> None:
        """Put them on a module that can carry them."""
        if isinstance(module, torch.jit.ScriptModule):
            return  # it cannot carry any
        if not self.are_on(module):  # they are where it is part of an earlier root, or a copy of such a part
            before = module.register_forward_pre_hook(self._before)
            after = module.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self._handles[id(module)] = before, after

    def are_on(self, module: nn.Module) -> bool:
        """Whether a module carries them."""
        return any(getattr(hook, "__self__", None) is self._owner for hook in module._forward_pre_hooks.values())

    def turn(self, module: nn.Module, wanted: bool) -> None:
        """Put them on a module, or take them off, if it is not so already."""
        if (id(module) in self._handles) is wanted:
            return
        if wanted:
            self.put(module)
            return
        for handle in self._handles.pop(id(module)):
            handle.remove()

    def forget(self, key: int) -> None:
        """The module of this id is gone."""
        self._handles.pop(key, None)

    def _scripted(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """`torch.jit.script`, which would compile our hooks with a module."""
        taken = [module for module in obj.modules() if self.are_on(module)] if isinstance(obj, nn.Module) else []
        for module in taken:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is self._owner]:
                    del hooks[number]
        try:
            return self._script(obj, *args, **kwargs)
        finally:
            for module in taken:
                self.put(module)
