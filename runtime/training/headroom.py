"""What a training step takes of the tier that computes beside weights: activations, logits, and their gradients.

It is rehearsed with the model's own forward and backward on tensors without bytes, as `penstock plan --sizes` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn
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
from .savedcount import without_bytes
from .saves import ForwardSaves

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRoom:
    """What an automatic budget leaves free, and for what."""

    headroom_nbytes: int
    activations: Activations
    """Whether they are kept, or not: that much room is left, and no more. By a plan (auto) what room there is elsewhere
    holds as much of them as pays; only what cannot be helped is left room for here."""
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
    packed: bool = False,
    saves: ForwardSaves | None,
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
        packed: Whether these hold several documents, which positions keep apart.
        saves: What a forward leaves for backward, if that is known.

    Raises:
        UsageError: the model has fewer positions than `context`.
    """
    sizes = [parameter.nbytes for parameter in model.parameters()]
    workload = Workload(train="adamw", batch=batch or 1, context=context or 0, packed=packed)
    kept = None
    if activations != "recompute":
        kept = _headroom(model, sizes, workload, device, recompute=False)
        fits = activations == "auto" and _fits(
            sum(sizes), changing, FRAMEWORK if kept is None else kept, wanted, device
        )
        if activations == "keep" or fits:
            return _room(model, kept, context, batch, activations="keep")
    made_again = _headroom(model, sizes, workload, device, recompute=True)
    found = _room(model, made_again, context, batch, activations=activations)
    if activations != "recompute":
        found = replace(found, headroom_nbytes=found.headroom_nbytes + moving_nbytes(saves))
    return found


def moving_nbytes(saves: ForwardSaves | None) -> int:
    """What activations take that leave: on their way out they are still there, and a layer's come back ahead of it."""
    return LEAVING + (0 if saves is None else saves.largest_nbytes)


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
    model: nn.Module, sizes: Sequence[int], workload: Workload, device: Device, *, recompute: bool
) -> int | None:
    """What a step takes; None where it cannot be rehearsed."""
    if not isinstance(model, PreTrainedModel):
        return None
    workload = with_context(model, workload)
    step = measure_step(
        without_bytes(model), workload, checkpointing=recompute, on_cpu=device.torch_device.type == "cpu"
    )
    if step is None:
        return None
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    copied = norm_copy_nbytes(trained, separate=device.separate)
    return FRAMEWORK + step + max(sizes, default=0) + copied  # a gradient is there before it is taken


def norm_copy_nbytes(parameters: Iterable[nn.Parameter], *, separate: bool) -> int:
    """What the norm of the largest gradient takes of a device apart: one in half precision is copied to fp32 for it."""
    return max((4 * each.numel() for each in parameters if separate and each.itemsize < 4), default=0)
