"""What autograd saves between forward and backward, by module, from saved-tensor hooks.

The hooks hand out what they were given: nothing is copied or moved. torch applies only the innermost pair of hooks, so
what a program's own hooks save (checkpointing, save_on_cpu) is theirs, and not seen here.
"""

from __future__ import annotations

from typing import Any

import torch

from .calls import ModuleWatch
from .recorder import Recorder
from .schema import Category
from .tensors import TensorWatch, storage_key, tier_of


class _Saved:
    """A saved tensor, and the count of its storage for as long as the graph holds it."""

    __slots__ = ("_key", "_watch", "tensor")

    def __init__(self, watch: ActivationWatch, key: int, tensor: torch.Tensor) -> None:
        self._watch, self._key, self.tensor = watch, key, tensor

    def __del__(self) -> None:
        self._watch._release(self._key)


class ActivationWatch:
    """Counts saved tensors while it is entered."""

    def __init__(self, recorder: Recorder, watch: ModuleWatch, tensors: TensorWatch) -> None:
        self._recorder = recorder
        self._watch = watch
        self._tensors = tensors
        self._live: dict[int, list[Any]] = {}
        """By storage: how many saved tensors share it, its tier, bytes and module."""
        self._hooks: Any = None

    def __enter__(self) -> ActivationWatch:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._hooks.__exit__(None, None, None)

    def _pack(self, tensor: torch.Tensor) -> Any:
        key = storage_key(tensor)
        if not key or key in self._tensors.known:
            return tensor
        self._recorder.hooks += 1
        held = self._live.get(key)
        if held is None:
            row, tier, nbytes = self._watch.current(), tier_of(tensor), tensor.untyped_storage().nbytes()
            self._live[key] = [1, tier, nbytes, row]
            self._recorder.memory(nbytes, tier, Category.ACTIVATION, module=row)
        else:
            held[0] += 1
        return _Saved(self, key, tensor)

    def _release(self, key: int) -> None:
        held = self._live[key]
        held[0] -= 1
        if not held[0]:
            del self._live[key]
            self._recorder.memory(-held[2], held[1], Category.ACTIVATION, module=held[3])


def _unpack(saved: Any) -> torch.Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved
