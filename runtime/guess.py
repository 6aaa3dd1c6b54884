"""The order to expect of a root call that has not run yet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from torch import nn

from ..scheduler.processors import ALWAYS
from .layout import Layout


class Root(NamedTuple):
    """A root call with few rows: it uses fewer blocks of the device's than one with many, in an order of its own."""

    module: int
    """Index of the module."""
    under: int
    """The least number of rows, among those below which blocks are computed on the CPU, that it stays below."""
    part: frozenset[int] | None = None
    """The blocks that the CPU computes where it computes no others; None for all that it can."""


def breadth_of(root: Hashable) -> int:
    """How much of the device's a root call uses, compared with others of the same module."""
    return root.under if isinstance(root, Root) else ALWAYS


def module_of(root: Hashable) -> Hashable:
    """What root calls have in common that may share a sweep."""
    return root.module if isinstance(root, Root) else root


def guess_of(module: nn.Module, layout: Layout, on_cpu: Mapping[int, int]) -> Callable[[Hashable], tuple[int, ...]]:
    """For a root, or the index of a module alone where rows are many: its blocks as they are defined.

    Those that the CPU computes in a call of as many rows are left out: the device has no use for them.
    """
    paths = [path for path, _ in module.named_modules()]

    def guess(root: Hashable) -> tuple[int, ...]:
        key, under, part = root if isinstance(root, Root) else (root, ALWAYS, None)
        assert isinstance(key, int)
        prefix = paths[key]
        inside = (p for p in paths if p == prefix or not prefix or p.startswith(f"{prefix}."))
        expected = (block for path in inside for block in layout.expected.get(path, ()))
        return tuple(b for b in expected if on_cpu.get(b, 0) < under or (part is not None and b not in part))

    return guess
