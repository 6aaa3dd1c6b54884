"""What goes into a module's call and comes out of it: how many rows it has, and how it crosses to the CPU and back."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch

from . import caches
from .crossing import Crossing, Twins

_PLAIN: Final = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types of arguments that mean the same on every processor."""
_IDS: Final = ("decoder_input_ids", "input_ids")


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of a call: all dimensions but the last of its first floating tensor, or all of its first tensor of ids.

    None where it is given no tensor.
    """
    first: torch.Tensor | None = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                return value.numel() // max(value.shape[-1], 1) if value.dim() else 1
            first = value if first is None else first
    return None if first is None else first.numel()


def rows_of_root(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The same of a root call, which may be given ids and a mask, and states of an encoder besides."""
    for name in _IDS:
        ids = kwargs.get(name)
        if isinstance(ids, torch.Tensor):
            return ids.numel()
    return rows_of(args, kwargs)


def portable(value: Any, layers: Collection[int]) -> bool:
    """Whether it is known how an argument of a module with these entries in a cache crosses."""
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor and value.layout is torch.strided  # a parameter's bytes come and go
    if isinstance(value, _PLAIN):
        return True
    if type(value) in (tuple, list) or _is_named(value):
        return all(portable(item, layers) for item in value)
    if type(value) is dict:
        return all(portable(item, layers) for item in value.values())
    return caches.is_cache(value) and caches.can_move(value, layers)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument or a result, in containers too, but not in caches."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument or a result with what `change` makes of its leaves. Containers in which nothing changes stay."""
    if isinstance(value, dict):
        found = {key: replaced(item, change) for key, item in value.items()}
        if all(found[key] is item for key, item in value.items()):
            return value
        if type(value) is dict:
            return found
        for key, item in found.items():  # transformers' outputs are dicts with attributes
            value[key] = item
        return value
    if type(value) in (tuple, list) or _is_named(value):
        items = [replaced(item, change) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if _is_named(value) else type(value)(items)
    return change(value)


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


class Bundle:
    """What crosses for one call: its arguments to the host, its result to the device."""

    def __init__(self, crossing: Crossing, twins: Twins) -> None:
        self._crossing = crossing
        self._twins = twins
        self._wanted: dict[int, torch.Tensor] = {}
        self._here: dict[int, torch.Tensor] = {}
        """Copies by id of the device's tensor."""
        self._missing: list[torch.Tensor] = []
        """Those that had no copy yet."""
        self._arrived: Callable[[], list[torch.Tensor]] = list
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        """The device's tensor, the host's, and the version of the latter when they were the same."""

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to carry the arguments to the host, each tensor once, behind what the device has been given so far."""
        wanted = {id(t): t for t in tensors_in((args, kwargs)) if self._crossing.away(t)}
        self._here = {key: copy for key, t in wanted.items() if (copy := self._twins.find(t)) is not None}
        self._wanted, self._missing = wanted, [tensor for key, tensor in wanted.items() if key not in self._here]
        self._arrived = self._crossing.leaving(self._missing) if self._missing else list

    def arrive(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that left, as the CPU is to have them; the device's name becomes the CPU's."""
        here = self._here
        for tensor, copy in zip(self._missing, self._arrived(), strict=True):
            here[id(tensor)] = copy
            self._twins.add(tensor, copy)
        self._pairs = [(tensor, here[key], here[key]._version) for key, tensor in self._wanted.items()]

        def change(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return here.get(id(value), value)
            return torch.device("cpu") if isinstance(value, torch.device) and value == device else value

        return replaced(args, change), replaced(kwargs, change)

    def to_host(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Both at once."""
        self.leave(args, kwargs)
        return self.arrive(args, kwargs, device)

    def to_device(self, result: Any) -> Any:
        """The result as the device is to have it. Arguments that were changed in place are changed there too."""
        for tensor, copy, version in self._pairs:
            if copy._version != version:
                with torch.no_grad():
                    tensor.copy_(self._crossing.to_device([copy])[0])
                self._twins.add(tensor, copy)
        there = {id(copy): tensor for tensor, copy, _ in self._pairs}
        fresh = list({id(t): t for t in tensors_in(result) if id(t) not in there}.values())
        if fresh:
            for copy, tensor in zip(fresh, self._crossing.to_device(fresh), strict=True):
                there[id(copy)] = tensor
                self._twins.add(tensor, copy)
        return replaced(result, lambda value: there.get(id(value), value))
