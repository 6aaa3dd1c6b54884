"""Paths of modules: which of them are layers, and what is above each."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers(root: nn.Module) -> set[str]:
    """Paths of the modules worth a span of their own when recording must cost next to nothing."""
    chosen = {""}
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            chosen.update(f"{path}.{name}" if path else name for name, _ in module.named_children())
            chosen.update(above(path))
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                chosen.add(path)
    for name, _ in root.named_children():
        chosen.add(name)
    return chosen


def is_element(root: nn.Module, path: str) -> bool:
    """Whether a module is one of a stack: there may be very many of them."""
    if "." not in path:
        return False  # parts of a model are called by themselves, too: they count as its roots then
    return isinstance(root.get_submodule(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential | nn.ModuleDict)


def above(path: str) -> Iterator[str]:
    """The paths above, nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path
