"""Activations between the memory of a separate device and the host's, for parts of a model that the CPU computes.

Only the caller's own stream is waited for, never the device. What crosses is small: the hidden states of a few tokens,
a mask, and once per change of phase the keys and values of a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch

from .devices.base import Device
from .operands import copy_in_place_of

_cuda: Final[Any] = torch.cuda
"""For calls that torch leaves untyped."""

PINNED_NBYTES: Final = 4 * 2**20
"""Larger tensors cross from pageable memory: torch's allocator keeps pinned memory for good, in powers of two."""


class Crossing(Protocol):
    """Copies tensors to the other memory. The copies are the caller's own, and no inference tensors."""

    def away(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the device's memory."""
        ...

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies that the CPU may read when this returns."""
        ...

    def leaving(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy behind what the caller's stream holds now; what is returned waits, and gives the copies."""
        ...

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies that the caller's stream may read; the originals may be changed when this returns."""
        ...


class EmulatedCrossing:
    """Both memories are the host's. Tensors are copied all the same, to addresses that kernels treat alike."""

    def away(self, tensor: torch.Tensor) -> bool:
        """Whatever a program has is taken to be the device's."""
        return True

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies with the strides of the originals: results may depend on them by a bit."""
        with torch.inference_mode(False), torch.no_grad():
            return [_expanded(copy_in_place_of(_narrowed(tensor)).requires_grad_(False), tensor) for tensor in tensors]

    to_device = to_host

    def leaving(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """There is nothing to wait for."""
        copies = self.to_host(tensors)
        return lambda: copies


class CudaCrossing:
    """Copies on the caller's current stream, by pinned memory where they are small.

    Read after write: the host waits for an event behind all copies to it. Write after read: pinned memory comes from
    torch's allocator, which gives it to nobody else before the copies that read it have passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def away(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of the device's."""
        return tensor.device == self._device

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One wait for all of them."""
        return self.leaving(tensors)()

    def leaving(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Enqueued, but for tensors too large for pinned memory; no later work of the stream is waited for."""
        with torch.inference_mode(False), torch.no_grad():
            sources = [_dense(_narrowed(tensor)) for tensor in tensors]
            found = [_host_memory(source) for source in sources]
            for target, source in zip(found, sources, strict=True):
                target.copy_(source, non_blocking=True)
            event = _cuda.Event(blocking=False)
            event.record(_cuda.current_stream(self._device))

        def arrived() -> list[torch.Tensor]:
            event.synchronize()
            with torch.inference_mode(False), torch.no_grad():
                return [_expanded(copy, tensor) for copy, tensor in zip(found, tensors, strict=True)]

        return arrived

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Enqueued, and not waited for."""
        found = []
        with torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                source = _dense(_narrowed(tensor))
                if _is_small(source):  # a larger one is staged by the driver, piece by piece
                    source = _host_memory(source).copy_(source)
                found.append(_expanded(source.to(self._device, non_blocking=True), tensor))
        return found


def crossing_of(device: Device) -> Crossing:
    """The crossing to a separate device."""
    assert device.separate, f"{device.name} has no memory of its own"
    return EmulatedCrossing() if device.torch_device.type == "cpu" else CudaCrossing(device.torch_device)


def _host_memory(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, pin_memory=_is_small(like))


def _is_small(tensor: torch.Tensor) -> bool:
    return 0 < tensor.nbytes <= PINNED_NBYTES


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Without what was only expanded: a mask for all heads is one for each."""
    tensor = tensor.detach()
    for dim, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _expanded(copy: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return copy if copy.size() == like.size() else copy.expand(like.size())


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """As one piece of memory, since no more than a tensor's own bytes are to cross."""
    return tensor if tensor.numel() == _extent(tensor) else tensor.contiguous()


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


class _Pair(NamedTuple):
    """A tensor of the device and its copy in the host, as they were when they were the same."""

    tensor: weakref.ref[torch.Tensor]
    copy: torch.Tensor
    versions: tuple[int, int]


class Twins:
    """Which tensor of the host holds what one of the device does: a mask is to cross once per token, not per layer.

    A copy is forgotten with its original, when either has been changed, and, if it was wanted only once, when the root
    call ends. Inference tensors do not tell that they were changed; they cross each time.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, _Pair] = {}
        self._wanted_again: set[int] = set()

    def __len__(self) -> int:
        return len(self._pairs)

    def find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The copy of a device's tensor, if there is one that is still true."""
        pair = self._pairs.get(id(tensor))
        if pair is None or pair.tensor() is not tensor or pair.versions != _versions(tensor, pair.copy):
            return None
        self._wanted_again.add(id(tensor))
        return pair.copy

    def add(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """The two hold the same."""
        versions = _versions(tensor, copy)
        if versions is None:
            return
        key = id(tensor)
        self._pairs[key] = _Pair(weakref.ref(tensor, lambda _: self._forget(key)), copy, versions)

    def _forget(self, key: int) -> None:
        self._pairs.pop(key, None)
        self._wanted_again.discard(key)

    def end_of_call(self) -> None:
        """Forget what is unlikely to come again: hidden states that a caller keeps would be kept twice."""
        for key in list(self._pairs):  # tensors that die meanwhile take their pairs with them
            if key not in self._wanted_again:
                self._pairs.pop(key, None)
        self._wanted_again.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._pairs.clear()
        self._wanted_again.clear()


def _versions(tensor: torch.Tensor, copy: torch.Tensor) -> tuple[int, int] | None:
    if tensor.is_inference() or copy.is_inference():
        return None
    return tensor._version, copy._version
