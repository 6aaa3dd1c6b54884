"""From checkpoint tensors to model parameters, by transformers' own conversion mapping.

transformers renames, merges, splits and permutes checkpoint tensors while it loads them. Here its loader runs on
symbolic tensors (see symbolic.py), so that names, merges, casts, ties and what counts as missing agree with
from_pretrained by construction, and no byte is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..memory.checkpoint import Checkpoint
from ..memory.errors import CheckpointError
from ..memory.layout import TensorSource
from ..memory.safetensors_header import same_bytes
from .symbolic import Stored, Symbolic, evaluate, leaves, symbol

logger = logging.getLogger(__name__)

MAX_INITIALISED_NBYTES: Final = 256 * 2**20
"""Bytes of buffers and exempted tensors that a checkpoint may leave to be computed. They are made in memory at once, so
a config must not be able to ask for any amount."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A tensor whose bytes lie in no file as they are needed: computed once from its sources."""

    sources: Mapping[str, TensorSource]
    nbytes: int
    """Bytes of the result."""
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    """Takes the sources as stored, by their key; returns the target by its name, cast and contiguous. The arithmetic is
    transformers' own, so the bits are those of from_pretrained."""


Source = TensorSource | Converted


def bind_sources(model: PreTrainedModel, checkpoint: Checkpoint, *, dtype: torch.dtype) -> dict[str, Source]:
    """Find the source of every parameter and persistent buffer of a model built on the meta device.

    On return the parameters and persistent buffers are still on meta, with the dtype from_pretrained gives them; ties
    are tied; non-persistent buffers are real. Keyed by the names of `named_parameters()` and `named_buffers()`: a tied
    tensor occurs once. A tensor that the model's class exempts from loading is real and has no source.

    Raises CheckpointError where a tensor is missing, has another shape than the config says, or cannot be converted.
    """
    mapping: list[Any] = get_model_conversion_mapping(model)
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=checkpoint.folder,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    symbols = {name: symbol(source) for name, source in checkpoint.tensors.items()}
    info, _ = convert_and_load_state_dict_in_model(model, symbols, load_config)
    _check_conversion(checkpoint, info)
    found = _lift(model)
    _join_equal_ties(model, info, found)
    _check_missing(model, checkpoint, info)
    model._finalize_model_loading(model, load_config, info)
    return {
        name: found[id(tensor)]
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
        if id(tensor) in found
    }


def _check_conversion(checkpoint: Checkpoint, info: Any) -> None:
    for name, report in info.conversion_errors.items():
        reason = report.strip().splitlines()[-1]
        raise CheckpointError(
            f"{checkpoint.folder}: {name!r} cannot be made from the checkpoint's tensors ({reason}); "
            "the config and the weights do not belong together, or the checkpoint needs a newer transformers"
        )
    for name, stored, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{checkpoint.folder}: {name!r} is {list(stored)} in the checkpoint, but {list(expected)} by its config; "
            "the two do not belong together: restore the config.json that was saved with these weights"
        )


def _lift(model: PreTrainedModel) -> dict[int, Source]:
    """Put meta tensors in the place of the symbolic ones; their sources, by the id of the meta tensor."""
    found: dict[int, Source] = {}
    replaced: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if not isinstance(tensor, Symbolic):
                    continue
                if id(tensor) not in replaced:
                    replaced[id(tensor)] = meta = _like(tensor)
                    found[id(meta)] = _source(tensor, f"{path}.{name}" if path else name)
                slots[name] = replaced[id(tensor)]
    return found


def _like(tensor: Symbolic) -> torch.Tensor:
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        meta = torch.nn.Parameter(meta, requires_grad=tensor.requires_grad)
    # What transformers marks a loaded tensor with, so as not to initialise it.
    meta._is_hf_initialized = True  # type: ignore[attr-defined]
    return meta


def _source(tensor: Symbolic, name: str) -> Source:
    if isinstance(tensor.value, Stored):
        return TensorSource(shape=tuple(tensor.shape), dtype=tensor.value.dtype, spans=tensor.value.spans)
    inputs = {f"{name}#{i}": leaf for i, leaf in enumerate(leaves(tensor))}
    sources: dict[str, TensorSource] = {}
    for key, leaf in inputs.items():
        assert isinstance(leaf.value, Stored)
        sources[key] = TensorSource(shape=tuple(leaf.shape), dtype=leaf.value.dtype, spans=leaf.value.spans)

    def convert(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: evaluate(tensor, {id(leaf): stored[key] for key, leaf in inputs.items()})}

    return Converted(sources=sources, nbytes=tensor.numel() * tensor.element_size(), convert=convert)


def _join_equal_ties(model: PreTrainedModel, info: Any, found: Mapping[int, Source]) -> None:
    """Decide the ties of which the checkpoint has both sides: tied where the bytes are equal, as by from_pretrained.

    It compares values, which the meta device has not; so a side with equal bytes is called missing, and gets tied.
    """
    for target, origin in list(model.all_tied_weights_keys.items()):
        if target in info.missing_keys or origin in info.missing_keys:
            continue
        one, other = (found.get(id(model.get_parameter_or_buffer(name))) for name in (target, origin))
        equal = one is other or (
            isinstance(one, TensorSource)
            and isinstance(other, TensorSource)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
            and same_bytes(one.spans, other.spans)
        )
        if equal:
            info.missing_keys.add(target)
        else:
            logger.warning(
                "%s and %s differ in the checkpoint, so they are not tied, whatever the config says", target, origin
            )
            model.all_tied_weights_keys.pop(target)


def _check_missing(model: PreTrainedModel, checkpoint: Checkpoint, info: Any) -> None:
    """Refuse a checkpoint that leaves out tensors, before any of them would be allocated."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    held = {origin for target, origin in ties.items() if {target, origin} - info.missing_keys}
    exempt = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    nbytes = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    for name in sorted(info.missing_keys):
        tensor = model.get_parameter_or_buffer(name)
        if ties.get(name, name) in held or getattr(tensor, "_is_hf_initialized", False):
            continue
        if not any(pattern.search(name) for pattern in exempt):
            unexpected = len(info.unexpected_keys)
            raise CheckpointError(
                f"{checkpoint.folder}: the tensor {name!r} {list(tensor.shape)}, which {type(model).__name__} needs, "
                f"is missing ({len(checkpoint.tensors)} tensors there, {unexpected} of them of no use to it); "
                "download or save the checkpoint again, or correct `architectures` in its config.json"
            )
        nbytes += tensor.nbytes
    if nbytes > MAX_INITIALISED_NBYTES:
        raise CheckpointError(
            f"{checkpoint.folder}: its config asks for {nbytes} bytes of buffers that no file holds, at most "
            f"{MAX_INITIALISED_NBYTES} are sensible; correct config.json"
        )
