"""What a model is fed when only its kind and the size of the work are known. Values do not matter, shapes do."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..memory.errors import UsageError
from ..scheduler.sizes import DEFAULT_CONTEXT, Workload
from .rehearsal import tensors_in


class UnknownInputError(Exception):
    """Nobody has said yet what this kind of model is to be fed."""


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether the forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def with_context(model: PreTrainedModel, workload: Workload) -> Workload:
    """The workload with a context that the model has positions for.

    Raises:
        UsageError: it asks for more; the message names how many there are.
    """
    text = model.config.get_text_config(decoder=True)
    limits = {name: getattr(text, name, None) for name in ("max_target_positions", "max_position_embeddings")}
    named = {name: limit for name, limit in limits.items() if isinstance(limit, int) and limit > 0}
    if workload.context == DEFAULT_CONTEXT:
        return replace(workload, context=min([512, *named.values()]))
    for name, limit in named.items():
        if limit < workload.context:
            raise UsageError(
                f"--context {workload.context}: {type(model).__name__} has {limit} positions ({name}); give at most "
                f"{limit}"
            )
    return workload


def inputs_of(model: PreTrainedModel, workload: Workload) -> dict[str, Tensor]:
    """What the model, or its encoder, reads.

    Raises:
        UnknownInputError: it is none of the kinds known here.
    """
    name = model.main_input_name
    vision = getattr(model.config, "vision_config", None)
    if name == "input_ids":
        found = {"input_ids": token_ids(workload.batch, workload.context)}
        if takes(model, "pixel_values") and not model.can_generate() and vision is not None:
            found["pixel_values"] = _pixels(vision, model, workload.batch)
        return found
    if name == "pixel_values":
        return {name: _pixels(vision or model.config, model, workload.batch)}
    if name == "input_features":
        bins, positions = (getattr(model.config, key, None) for key in ("num_mel_bins", "max_source_positions"))
        if isinstance(bins, int) and isinstance(positions, int):
            return {name: torch.empty(workload.batch, bins, 2 * positions, dtype=model.dtype)}
    raise UnknownInputError(f"what {type(model).__name__} reads as {name} is not known here")


def labels_of(model: PreTrainedModel, inputs: dict[str, Tensor], workload: Workload) -> dict[str, Tensor]:
    """What the model is to have answered, if it computes its own loss."""
    if not takes(model, "labels"):
        return {}
    kind = type(model).__name__
    if "Classification" in kind and "Token" not in kind:
        return {"labels": torch.zeros(workload.batch, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        return {"labels": token_ids(workload.batch, workload.context)}
    if "input_ids" in inputs and ("LM" in kind or "Generation" in kind or "Token" in kind):
        return {"labels": token_ids(workload.batch, workload.context)}
    return {}


def loss_of(model: PreTrainedModel, workload: Workload) -> Tensor:
    """Run the forward of a training step. The model's own loss; where it has none, one that all outputs are in.

    Raises:
        UnknownInputError: as `inputs_of`.
    """
    inputs = inputs_of(model, workload)
    labels = labels_of(model, inputs, workload)
    if not labels and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(workload.batch, workload.context)
    options: dict[str, Any] = {}
    if workload.packed and takes(model, "position_ids"):
        # With a cache, transformers takes positions for those of one text; values that are not there, for several.
        options = {"position_ids": token_ids(workload.batch, workload.context)}
        options |= {"use_cache": False} if takes(model, "use_cache") else {}
    output = model(**inputs, **labels, **options)
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    return sum((each.float().mean() for each in tensors_in(output) if each.requires_grad), torch.zeros(()))


def token_ids(batch: int, length: int) -> Tensor:
    """Ids of tokens, of shape (batch, length)."""
    return torch.zeros(batch, length, dtype=torch.long)


def _pixels(config: Any, model: PreTrainedModel, batch: int) -> Tensor:
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size or (0, 0)
    if not height:
        raise UnknownInputError(f"the size of the pictures of {type(model).__name__} is not in its config")
    return torch.empty(batch, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)
