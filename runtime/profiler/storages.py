"""Where a tensor's bytes are: its storage, its tier, and the parts of tensors that are made of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .schema import Tier


def tier_of(tensor: torch.Tensor) -> Tier:
    """Where a tensor's bytes are."""
    return Tier.HOST if tensor.device.type == "cpu" else Tier.DEVICE


def storage_key(tensor: torch.Tensor) -> int:
    """A number that all views of one storage share; 0 for tensors that have no memory of their own."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or is_fake(tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # subclasses without a storage of their own
        return 0


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it only stands for one (models are rehearsed on such): to ask for its address is an error."""
    return type(tensor).__name__ == "FakeTensor"


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors whose storages hold a tensor: itself, but for sparse ones and for subclasses that wrap others."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def address(tensor: torch.Tensor) -> int:
    """Of the first element; 0 where there is none to have one."""
    if is_fake(tensor):
        return 0
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def tensors_in(value: Any, nesting: int = 8) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments or result, also inside tuples, lists and dicts.

    Other collections are not looked into: reading them may be work, or change them. Neither are long ones of numbers.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and nesting:
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, tuple | list | dict):
                yield from tensors_in(item, nesting - 1)
