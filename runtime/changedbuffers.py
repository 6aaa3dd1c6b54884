"""Buffers that forwards of a module change (running statistics, vectors of a power iteration): as they were before.

A second forward has to begin with what the first one began with, and to leave no trace. Which buffers those are is
learned from the values that the first forward in each mode leaves: kernels of norms change theirs without telling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ChangedBuffers:
    """Those of one module.

    Args:
        module: With its parts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[tuple[bool, ...], frozenset[str]] = {}
        """By mode, which of its parts train."""

    def before(self) -> dict[str, Tensor]:
        """Copies of those that a forward may change, before it."""
        known = self._known.get(self._mode())
        return {
            name: buffer.detach().clone()
            for name, buffer in self._module.named_buffers()
            if known is None or name in known
        }

    def changed(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of these copies, those of buffers that the forward has changed."""
        mode = self._mode()
        if mode not in self._known:
            now = dict(self._module.named_buffers())
            self._known[mode] = frozenset(
                name for name, value in before.items() if name not in now or not torch.equal(now[name], value)
            )
        return {name: value for name, value in before.items() if name in self._known[mode]}

    @contextmanager
    def as_before(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """They are as they were then; afterwards as they are now."""
        buffers = {name: buffer for name, buffer in self._module.named_buffers() if name in values}
        now = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        try:
            _write(buffers, values)
            yield
        finally:
            _write(buffers, now)

    def _mode(self) -> tuple[bool, ...]:
        return tuple(child.training for child in self._module.modules())


def _write(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """In place, and without counting as a change: autograd keeps some of them, for nothing that depends on it."""
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.data.copy_(values[name])
