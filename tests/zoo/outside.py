"""Finds weights that are used while the forward of the module that owns them is not running.

A hook on the owner never sees such a use, so whatever streams must lease these weights for somebody else: the block, or
the module that is running.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .entry import Entry


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[nn.Module]] = {}
        self.names: dict[int, str] = {}
        self.found: dict[str, str] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(module)
                self.names.setdefault(id(parameter), f"{path}.{name}".lstrip("."))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self.owners:
                owners = self.owners[id(leaf)]
                if not any(owner is module for owner in owners for module in self.running):
                    user = self._paths[id(self.running[-1])] if self.running else "outside any forward"
                    self.found.setdefault(self.names[id(leaf)], f"{user or 'the root'} ({func})")
        return func(*args, **(kwargs or {}))


def used_outside(entry: Entry) -> dict[str, str]:
    """Each parameter that `entry` uses outside its owner's forward, and the module that was running instead."""
    model = entry.build()
    watch = _Watch(model)
    forwards = []
    for module in model.modules():
        # The forward is wrapped, not hooked: torch's encoder gives up its fused path where it sees hooks.
        forwards.append((module, module.forward))
        module.forward = _noting(module, watch.running)
    try:
        with watch:
            entry.run(model)
    finally:
        for module, forward in forwards:
            module.forward = forward
    return watch.found


def _noting(module: nn.Module, running: list[nn.Module]) -> Any:
    forward = module.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        running.append(module)
        try:
            return forward(*args, **kwargs)
        finally:
            running.pop()

    # generate() looks at forward's signature to see which arguments the model takes.
    noted.__wrapped__ = forward  # type: ignore[attr-defined]
    return noted
