"""Buffers that forwards of a module change (running statistics, vectors of a power iteration): as they were before.

A second forward has to begin with what the first one began with, and to leave no trace. Which buffers those are is seen
from their values, each time: kernels of norms change theirs without telling, and some modules only in some forwards.
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

    def before(self) -> dict[str, Tensor]:
        """Copies of all, before a forward."""
        return {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}

    def changed(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of these copies, those of buffers that the forward has changed."""
        now = dict(self._module.named_buffers())
        return {name: value for name, value in before.items() if name not in now or not torch.equal(now[name], value)}

    @contextmanager
    def as_before(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """They are as they were then; afterwards all are as they are now, and the same tensors."""
        buffers = dict(self._module.named_buffers())
        now = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        try:
            _write(buffers, values)
            yield
        finally:
            for name, buffer in buffers.items():
                path, _, own = name.rpartition(".")
                self._module.get_submodule(path)._buffers[own] = buffer
            _write(buffers, now)


def _write(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """In place, and without counting as a change: autograd keeps some of them, for nothing that depends on it."""
    with torch.no_grad():
        for name, value in values.items():
            if name in buffers:
                buffers[name].data.copy_(value)
