"""The loss of a model on batches that it does not learn from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .adapters import without_adapters
from .data.batches import Batch


def model_inputs(model: Any, batch: Batch) -> Mapping[str, Any]:
    """A batch as this model's forward takes it: on its device, and with what it does not know left out.

    A model that takes no positions sees the documents of a sequence as one text.
    """
    named = batch.inputs(positions=takes_positions(model))
    known = _parameters(model).values()
    if not any(each.name == "use_cache" or each.kind is each.VAR_KEYWORD for each in known):
        del named["use_cache"]
    device = model.device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in named.items()}


def takes_positions(model: Any) -> bool:
    """Whether documents that share a sequence can be kept apart. It is the class that says: what runs a model may have
    put a function of its own in the place of its `forward`."""
    return "position_ids" in _parameters(model)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Of the forward of the model itself: what PEFT wraps around it passes on whatever it is given."""
    return inspect.signature(type(without_adapters(model)).forward).parameters


def evaluate(model: Any, batches: Iterable[Batch]) -> float:
    """Mean loss over the loss tokens of all batches; not a number where there is none. Dropout is off meanwhile."""
    summed, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if batch.loss_tokens:  # the mean over none is no number
                    summed += model(**model_inputs(model, batch)).loss.item() * batch.loss_tokens
                    tokens += batch.loss_tokens
    finally:
        model.train(training)
    return summed / tokens if tokens else math.nan
