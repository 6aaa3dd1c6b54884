"""Buffers of a model: what forwards change (running statistics) and no master holds, so that commits hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...memory.errors import UsageError


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that `state_dict` has, by name; a shared one once."""
    skipped = {
        f"{path}.{name}" if path else name
        for path, child in model.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in skipped}


def pack_buffers(model: nn.Module) -> dict[str, bytes]:
    """Their bytes, in row-major order."""
    return {
        name: buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, buffer in persistent_buffers(model).items()
    }


def restore_buffers(model: nn.Module, packed: Mapping[str, bytes]) -> None:
    """Write them back, in place.

    Raises:
        UsageError: the model has others.
    """
    present = persistent_buffers(model)
    if present.keys() != packed.keys():
        name = min(present.keys() ^ packed.keys())
        raise UsageError(
            f"the run was saved with {len(packed)} buffers and this model has {len(present)}; {name} is only on one "
            "side. Give the model that the run was begun with"
        )
    for name, raw in packed.items():
        buffer = present[name]
        if buffer.nbytes != len(raw):
            raise UsageError(
                f"buffer {name} was saved with {len(raw)} bytes and has {buffer.nbytes} in this model. Give the model "
                "that the run was begun with"
            )
        if raw:
            value = torch.frombuffer(bytearray(raw), dtype=buffer.dtype).view(buffer.shape)
            buffer.copy_(value)
