"""The tensors that go into a torch call and come out of it: others in their place, copies, shapes, addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.linear_samples import is_laid_flat
from ..memory.image import ALIGN


def swap(value: Any, others: Mapping[int, torch.Tensor]) -> Any:
    """An argument of a torch call with some tensors, also those in a list, replaced by others."""
    if type(value) is list or type(value) is tuple:
        return type(value)(swap(item, others) for item in value)
    return others.get(id(value), value) if isinstance(value, torch.Tensor) else value


def folded(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A strided operand as a matrix, as torch folds it when the weight wants a gradient (see `Session.flagged`)."""
    return x if x.dim() < 3 or is_laid_flat(x, bias) else x.reshape(-1, x.shape[-1])


def unfolded(product: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A product in the shape that x asks for; a folded product has its bias added afterwards, as torch does."""
    if product.dim() == x.dim():
        return product
    product = product.view(*x.shape[:-1], product.shape[-1])
    return product if bias is None else product + bias


def copy_in_place_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor in fresh memory, at the same address modulo 64 and with the same strides."""
    view = tensor.detach()
    extent = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1 if view.numel() else 0
    store = torch.empty(extent * view.element_size() + ALIGN, dtype=torch.uint8, device=view.device)
    start = (view.data_ptr() - store.data_ptr()) % ALIGN
    size = view.element_size()
    assert start % size == 0 or not extent, "a tensor is not aligned to its elements"
    bits = store[start : start + extent * size]
    if bits.storage_offset() % size:  # torch counts offsets from the storage's start, in elements
        bits = bits.clone()
    copy = bits.view(view.dtype).as_strided(view.shape, view.stride(), bits.view(view.dtype).storage_offset())
    copy.copy_(view)
    return copy.requires_grad_(tensor.requires_grad)


def storage_address(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins; -1 for kinds without one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse tensors and other kinds without a storage
        return -1
