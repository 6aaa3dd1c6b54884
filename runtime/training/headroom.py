"""What a training step takes of the tier that computes beside weights: activations, logits, and their gradients.

It is rehearsed with the model's own forward and backward on tensors without bytes, as `penstock plan --sizes` does it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ...scheduler.sizes import Workload
from ..activations.store import LEAVING
from ..devices.base import Device
from ..feeding import with_context
from ..headroom import FRAMEWORK, headroom_nbytes
from ..layout import Changing
from ..sizing import measure_step
from ..tiers import Wanted, resolve_budgets
from .run import Activations

logger = logging.getLogger(__name__)


_OF_HIDDEN, _OF_WIDE = 14, 4
"""Elements that a layer saves per token, by its widths: norms in fp32 and as they go on, queries, keys, values and what
attention makes of them; and gate, its activation, up and the product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRoom:
    """What an automatic budget leaves free, and for what."""

    headroom_nbytes: int
    activations: Activations
    """Whether they are kept, or not: that much room is left, and no more. By a plan (auto) what room there is elsewhere
    holds as much of them as pays; only what cannot be helped is left room for here."""
    saved_nbytes: int | None = None
    """What keeping them would take more; None where it was not worked out."""
    known: bool
    """Whether a step was rehearsed; else it may take more, and all that is left over should stay free."""


def is_automatic(wanted: Wanted, device: Device) -> bool:
    """Whether a budget is to be worked out."""
    return wanted.host is None or (device.separate and wanted.device is None)


def step_room(
    model: nn.Module,
    changing: Changing,
    *,
    wanted: Wanted,
    device: Device,
    activations: Activations,
    context: int | None,
    batch: int | None,
) -> StepRoom:
    """Work out what a step takes. Takes seconds for a large model.

    Args:
        model: To be trained; its weights may be on the meta device. It is left as it is.
        changing: What updates take beside its weights.
        wanted: Budgets as asked for.
        device: That computes.
        activations: "auto" keeps them where everything fits beside them, and leaves them to a plan otherwise.
        context: Tokens per sequence.
        batch: Sequences of a backward pass.

    Raises:
        UsageError: the model has fewer positions than `context`.
    """
    sizes = [parameter.nbytes for parameter in model.parameters()]
    kept = None
    if activations != "recompute":
        kept = _headroom(model, sizes, context, batch, device, recompute=False)
        fits = activations == "auto" and _fits(
            sum(sizes), changing, FRAMEWORK if kept is None else kept, wanted, device
        )
        if activations == "keep" or fits:
            return _room(model, kept, context, batch, activations="keep")
    made_again = _headroom(model, sizes, context, batch, device, recompute=True)
    found = _room(model, made_again, context, batch, activations=activations)
    ahead = 0
    if kept is not None and made_again is not None:
        saved = max(0, kept - made_again)
        ahead = saved // max(_layers(model) - 1, 1)  # made again, all but those of one layer are saved
        found = replace(found, saved_nbytes=saved)
    if activations != "recompute":  # what is on its way out is still there, and so is what comes back ahead of its use
        found = replace(found, headroom_nbytes=found.headroom_nbytes + LEAVING + ahead)
    return found


def guessed_saved_nbytes(model: nn.Module, *, context: int | None, batch: int | None) -> int | None:
    """What the layers of a model of transformers' save for backward, for a share of a budget that was named.

    A guess, of what a pre-norm layer with a gated feed-forward saves: the rehearsal that an automatic budget is worked
    out by imports much of torch, which such a budget knows nothing of. What of the share is not used stays free.

    Args:
        model: To be trained; its weights may be on the meta device.
        context: Tokens per sequence.
        batch: Sequences of a backward pass.

    Returns:
        None where the number of tokens or the width of layers is not known.
    """
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    hidden, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if context is None or not hidden or not layers:
        return None
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    wide *= getattr(config, "num_experts_per_tok", None) or 1
    elements = _OF_HIDDEN * hidden + _OF_WIDE * wide
    return int((batch or 1) * context * layers * elements * next(model.parameters()).itemsize)


def _layers(model: nn.Module) -> int:
    return int(getattr(model.config, "num_hidden_layers", 1)) if isinstance(model, PreTrainedModel) else 1


def _room(
    model: nn.Module, rehearsed: int | None, context: int | None, batch: int | None, *, activations: Activations
) -> StepRoom:
    """What was rehearsed, or a guess and a warning."""
    if rehearsed is not None:
        return StepRoom(headroom_nbytes=rehearsed, activations=activations, known=True)
    guess = FRAMEWORK
    if isinstance(model, PreTrainedModel):
        guess = headroom_nbytes(model.config, model.dtype, context=context, batch=batch)
    logger.warning(
        "what forward and backward of a %s take cannot be worked out, and an automatic budget leaves %d MiB for it: "
        "name a budget with max_memory=… if that is too little",
        type(model).__name__,
        guess >> 20,
    )
    return StepRoom(headroom_nbytes=guess, activations=activations, known=False)


def _fits(weights_nbytes: int, changing: Changing, headroom: int, wanted: Wanted, device: Device) -> bool:
    budgets = resolve_budgets(wanted, device, headroom_nbytes=headroom, disk_rate=None, link_rate=None)
    if budgets.device is not None:
        return weights_nbytes <= budgets.device
    return weights_nbytes + changing.own_nbytes <= budgets.host


def _headroom(
    model: nn.Module, sizes: Sequence[int], context: int | None, batch: int | None, device: Device, *, recompute: bool
) -> int | None:
    """What a step takes; None where it cannot be rehearsed."""
    if not isinstance(model, PreTrainedModel):
        return None
    workload = with_context(model, Workload(train="adamw", batch=batch or 1, context=context or 0))
    step = measure_step(
        _without_bytes(model), workload, checkpointing=recompute, on_cpu=device.torch_device.type == "cpu"
    )
    if step is None:
        return None
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    copied = norm_copy_nbytes(trained, separate=device.separate)
    return FRAMEWORK + step + max(sizes, default=0) + copied  # a gradient is there before it is taken


def norm_copy_nbytes(parameters: Iterable[nn.Parameter], *, separate: bool) -> int:
    """What the norm of the largest gradient takes of a device apart: one in half precision is copied to fp32 for it."""
    return max((4 * each.numel() for each in parameters if separate and each.itemsize < 4), default=0)


def _without_bytes(model: PreTrainedModel) -> Any:
    """A copy on tensors that have shapes only."""
    mode = FakeTensorMode()
    made: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with mode:
            empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        trained = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
    return copy.deepcopy(model, made)
