"""Lending a block's bytes to the Parameters that stand for them.

A Parameter stays the same object for its whole life. While its block is leased its `.data` is a view of the slot;
between leases it is one NaN on the compute device, expanded to the true shape, so that identity, ties, shape, dtype and
device stay true and a use outside a lease cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from ..memory.arena import Slot
from ..memory.errors import ReadOnlyWeightError
from ..memory.image import Place


def placeholder(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One NaN (the largest value, for integers) seen as a tensor of the given shape and dtype."""
    kind = like.dtype
    if kind.is_floating_point or kind.is_complex:
        value: float | int | bool = float("nan")
    else:
        value = True if kind == torch.bool else torch.iinfo(kind).max
    return torch.full((), value, dtype=kind, device=device).expand(like.shape)


def view_of(
    arena: torch.Tensor, offset: int, place: Place, dtype: torch.dtype, stride: tuple[int, ...]
) -> torch.Tensor:
    """The tensor at `place` of the slot that starts at `offset` of a flat arena."""
    nbytes = place.nbytes
    if nbytes == 0:
        return torch.empty(place.shape, dtype=dtype, device=arena.device)
    flat = arena[offset + place.offset : offset + place.offset + nbytes].view(dtype)
    return flat.as_strided(place.shape, stride, flat.storage_offset())


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements."""
    return tuple(prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def version_of(parameter: nn.Parameter) -> int:
    """How often a parameter was changed in place; those made in inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version


@dataclass(kw_only=True, eq=False)
class Bound:
    """One parameter of a block."""

    name: str
    parameter: nn.Parameter
    place: Place
    stride: tuple[int, ...]
    empty: torch.Tensor
    """Its `.data` between leases."""
    host_place: Place | None = None
    """Where it lies in a host slot; None where it is never computed there, or where both tiers are one."""


@dataclass(kw_only=True, eq=False)
class Binding:
    """The parameters of one block, and the views of the slots it has been in."""

    block: int
    tensors: list[Bound]
    uses: int = 0
    slot: Slot | None = None
    """The slot that is lent, of the tier that computes; None also while it is the host's."""
    on_cpu: bool = False
    """Whether what is lent is the host's copy."""
    _views: dict[tuple[bool, int], list[torch.Tensor]] = field(default_factory=dict)
    _versions: list[int] = field(default_factory=list)
    _flagged: list[nn.Parameter] = field(default_factory=list)

    def views(self, arena: torch.Tensor, slot: Slot, *, host: bool = False) -> list[torch.Tensor]:
        """The parameters' values in a slot; `host` if it is one of the host tier, on the way to a separate device."""
        known = self._views.get((host, slot.offset))
        if known is None:
            known = []
            for bound in self.tensors:
                place = bound.host_place if host else bound.place
                assert place is not None, f"{bound.name} is not computed in the host tier"
                known.append(view_of(arena, slot.offset, place, bound.parameter.dtype, bound.stride))
            self._views[host, slot.offset] = known
        return known

    def bind(self, arena: torch.Tensor, slot: Slot, *, flagged: bool = False, host: bool = False) -> None:
        """Lend the slot to the parameters; `flagged` sets their `requires_grad` for as long (see `Session.flagged`).

        Several may have it lent at once, all of them from the same tier.
        """
        if self.uses == 0:
            try:
                self._lend(arena, slot, flagged, host)
            except BaseException:  # an interrupt must not leave some of them lent
                self._take_back()
                raise
        assert self.on_cpu is host, f"block {self.block} is lent from the other tier"
        self.uses += 1

    def _lend(self, arena: torch.Tensor, slot: Slot, flagged: bool, host: bool) -> None:
        self.slot = None if host else slot
        self.on_cpu = host
        for bound, view in zip(self.tensors, self.views(arena, slot, host=host), strict=True):
            bound.parameter.data = view
            if flagged and bound.parameter.is_floating_point() and not bound.parameter.requires_grad:
                bound.parameter.requires_grad_(True)
                self._flagged.append(bound.parameter)
        self._versions = [version_of(bound.parameter) for bound in self.tensors]

    def unbind(self) -> None:
        """Take the slot back.

        Raises:
            ReadOnlyWeightError: a parameter was changed in place; the change would be lost with the slot.
        """
        self.uses -= 1
        if self.uses:
            return
        held = zip(self.tensors, self._versions, strict=True)
        changed = next((bound.name for bound, version in held if version_of(bound.parameter) != version), None)
        self._take_back()
        if changed is not None:
            raise ReadOnlyWeightError(
                f"parameter {changed} was changed in place while it was only lent for reading; streamed weights are "
                f"read from their file again, so the change would be lost. Change it before offloading, or train with "
                f"penstock.prepare"
            )

    def _take_back(self) -> None:
        self.slot = None
        self.on_cpu = False
        for bound in self.tensors:
            bound.parameter.data = bound.empty
        while self._flagged:
            self._flagged.pop().requires_grad_(False)

    def restore(self) -> None:
        """Leave placeholders behind, whatever was bound."""
        self.uses = 0
        self._views.clear()
        self._take_back()
