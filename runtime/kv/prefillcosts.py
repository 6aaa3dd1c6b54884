"""What computing a prompt costs, from a calibration: the model's own code, run on tensors without bytes, says what it
is made of."""

from __future__ import annotations

import copy
import logging
from typing import Any, Final

import torch

from ...scheduler.kv.prefilltime import CalibratedPrefill
from ..experts.layers import find_expert_layers
from ..handle import Handle
from ..programs import prompt_program
from ..rehearsal import make_fake

logger = logging.getLogger(__name__)

TOKENS: Final = 64
"""Of the prompt that is rehearsed."""


def calibrated_prefill(model: Any) -> CalibratedPrefill | None:
    """What calls of a loaded model take on this machine.

    None where nothing is known: without a calibration, of a mixture of experts, whose costs depend on the router, and
    where the model's class cannot be made and called without weights. It takes as long as a forward's Python.
    """
    handle = getattr(model, "penstock", None)
    machinery = handle.machinery if isinstance(handle, Handle) else None
    if machinery is None or machinery.costs is None:
        return None
    assert isinstance(handle, Handle)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    if machinery.session.experts is not None or find_expert_layers(model, sizes, any_implementation=True) is not None:
        return None
    try:
        program = prompt_program(_twin(model), TOKENS)
    except Exception as error:  # a model's own code, without numbers: whatever it raises, it is measured then
        logger.debug("%s cannot be called without weights: %s", type(model).__name__, error)
        return None
    plan = handle.plan
    return CalibratedPrefill(
        costs=machinery.costs,
        operations=tuple(program.operations()),
        tokens=TOKENS,
        sweep_s=0.0 if plan.resident else plan.with_all_copied().bound_s(),
    )


def _twin(model: Any) -> Any:
    """The same model, with transformers' own attention and without bytes."""
    config = copy.deepcopy(model.config)
    for one in (config, config.get_text_config(decoder=True)):
        name = getattr(one, "_attn_implementation", None)
        one._attn_implementation_internal = getattr(name, "original", name)
    with torch.device("meta"):
        twin = type(model)(config).eval().to(model.dtype)
    make_fake(twin)
    return twin
