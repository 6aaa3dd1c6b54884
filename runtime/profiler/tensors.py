"""Bytes of weights, buffers, gradients and optimizer states, by module. Tied tensors are counted once, by storage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .calls import ModuleWatch
from .recorder import Recorder
from .schema import NONE, Category, Storage, Tier


def tier_of(tensor: torch.Tensor) -> Tier:
    """Where a tensor's bytes are."""
    return Tier.HOST if tensor.device.type == "cpu" else Tier.DEVICE


def storage_key(tensor: torch.Tensor) -> int:
    """A number that all views of one storage share; 0 for tensors that have no memory."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # subclasses without a storage of their own
        return 0


class TensorWatch:
    """Keeps the records of tensors that outlive a step up to date, when it is told to look."""

    def __init__(self, recorder: Recorder, watch: ModuleWatch) -> None:
        self._recorder = recorder
        self._watch = watch
        self._roots: list[weakref.ref[nn.Module]] = []
        self._elsewhere: set[int] = set()
        """Ids of parameters whose bytes somebody else accounts for."""
        self._held: dict[tuple[Category, int], tuple[Tier, int, int]] = {}
        """By category and storage: tier, bytes, module."""
        self.known: set[int] = set()
        """Storages of weights and buffers: what autograd saves of them is no activation."""
        self._rows: dict[int, int] = {}
        """By id of a parameter: the row of the module that owns it."""
        self._handles: list[Any] = []
        self._storages: dict[int, int] = {}
        """By id of a parameter: its storage, where it is accounted for here."""

    def leave_out(self, parameters: set[int]) -> None:
        """Parameters, by id, whose bytes are somebody else's to account for, from now on."""
        self._elsewhere |= parameters
        for parameter in parameters & self._storages.keys():
            self._give_back(self._storages.pop(parameter))

    def watch_what_is_there(self) -> None:
        """Account for modules and optimizers that the program made before the recording: they are no baseline."""
        gc.collect()  # what is dead already is nobody's
        objects = gc.get_objects()
        modules = [thing for thing in objects if issubclass(type(thing), nn.Module)]  # isinstance would wake proxies
        parts = {id(child) for module in modules for child in module.children()}
        roots = [module for module in modules if id(module) not in parts and any(True for _ in module.parameters())]
        for root in sorted(
            roots, key=lambda root: -sum(p.nbytes for p in root.parameters())
        ):  # the largest has no number
            self._watch.register(root)
            self.watch(root)
        self.look_at_gradients()
        for thing in objects:
            if issubclass(type(thing), torch.optim.Optimizer):
                self.look_at_states(thing)

    def watch(self, root: nn.Module) -> None:
        """Account for a root's weights and buffers from now on, until it is gone."""
        if any(known() is root for known in self._roots):
            return
        rows = self._watch.nearest(root)
        mine: set[int] = set()
        for name, parameter in root.named_parameters():
            row = rows[name.rpartition(".")[0]]
            self._rows[id(parameter)] = row
            if id(parameter) not in self._elsewhere:
                self._storages[id(parameter)] = self._take(name, parameter, Category.WEIGHT, row, mine)
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_came))
        for name, buffer in root.named_buffers():
            self._take(name, buffer, Category.BUFFER, rows[name.rpartition(".")[0]], mine)
        self._roots.append(weakref.ref(root, lambda gone: self._root_gone(gone, mine)))

    def _take(self, name: str, tensor: torch.Tensor, category: Category, row: int, mine: set[int]) -> int:
        key = storage_key(tensor)
        if not key or key in self.known:
            return key
        self.known.add(key)
        mine.add(key)
        nbytes, tier = tensor.untyped_storage().nbytes(), tier_of(tensor)
        number = self._recorder.storage(
            Storage(
                names=(name,),
                nbytes=nbytes,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                category=category,
                tier=tier,
                module=row,
            )
        )
        self._held[category, key] = tier, nbytes, row
        self._recorder.memory(nbytes, tier, category, module=row, storage=number)
        return key

    def _give_back(self, key: int) -> None:
        self.known.discard(key)
        for category in (Category.WEIGHT, Category.BUFFER):
            held = self._held.pop((category, key), None)
            if held is not None:
                self._recorder.memory(-held[1], held[0], category, module=held[2])

    def _root_gone(self, root: weakref.ref[nn.Module], storages: set[int]) -> None:
        if root in self._roots:
            self._roots.remove(root)
        for key in storages & self.known:
            self._give_back(key)

    def look_at_gradients(self) -> None:
        """Compare the gradients that are there with those that were there."""
        now: dict[int, tuple[torch.Tensor, int]] = {}
        for root in self._live_roots():
            for parameter in root.parameters():
                if parameter.grad is not None and id(parameter) not in self._elsewhere:
                    key = storage_key(parameter.grad)
                    if key:
                        now[key] = parameter.grad, self._rows.get(id(parameter), NONE)
        self._replace(Category.GRADIENT, now)

    def _gradient_came(self, parameter: torch.Tensor) -> None:
        """A gradient has been accumulated: it is counted when it is first seen."""
        if parameter.grad is not None and self._recorder.alive:
            self._recorder.hooks += 1
            self._hold(Category.GRADIENT, parameter.grad, self._rows.get(id(parameter), NONE))

    def close(self) -> None:
        """Take the hooks off the parameters."""
        while self._handles:
            self._handles.pop().remove()

    def look_at_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Account for what an optimizer keeps."""
        for parameter, state in optimizer.state.items():
            row = self._rows.get(id(parameter), NONE)
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    self._hold(Category.OPTIMIZER, value, row)

    def _hold(self, category: Category, tensor: torch.Tensor, row: int) -> None:
        key = storage_key(tensor)
        if not key or (category, key) in self._held:
            return
        nbytes, tier = tensor.untyped_storage().nbytes(), tier_of(tensor)
        self._held[category, key] = tier, nbytes, row
        self._recorder.memory(nbytes, tier, category, module=row)

    def _replace(self, category: Category, now: dict[int, tuple[torch.Tensor, int]]) -> None:
        for kind, key in [held for held in self._held if held[0] is category and held[1] not in now]:
            tier, nbytes, row = self._held.pop((kind, key))
            self._recorder.memory(-nbytes, tier, category, module=row)
        for tensor, row in now.values():
            self._hold(category, tensor, row)

    def _live_roots(self) -> Iterator[nn.Module]:
        return (root for known in self._roots if (root := known()) is not None)


def kv_tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors of the KV cache that a transformers model returned, if it did."""
    cache = getattr(result, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if layers is None and cache is not None:  # an encoder–decoder's: two caches
        parts = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
        layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    for layer in layers or ():
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(value, torch.Tensor):
                yield value
