"""Adapters of PEFT (LoRA, Hu et al., 2021) on a model whose own weights stream: what can be had, and what it takes.

PEFT makes the adapters and computes with them; nothing of it is copied here. It is an optional dependency, imported
where it is asked for.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from ...kernels.scratch import SUBCHUNK
from ...memory.arena import PAGE, round_up
from ...memory.errors import UsageError
from ...memory.image import ALIGN
from ..beside import Beside, trained_in
from ..devices.base import Device
from ..layout import Changing
from .pipeline import BUFFERS
from .room import activation_room
from .run import Activations
from .selection import only_trained
from .shards import cut_shards

_FREE: Final = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "task_type", "init_lora_weights"),
        *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    }
)
"""Settings of `LoraConfig` that may be anything. All others have to be what they are by default."""
_INITS: Final = (True, False, "gaussian", "orthogonal")
"""Beginnings that look at no weight of the model."""
_BUILT: Final = (
    "build the model in memory, wrap it by peft.get_peft_model, and give penstock.prepare what that returns, without "
    "lora="
)
_REMEDIES: Final[Mapping[str, str]] = {
    "bias": 'biases of the model would be trained beside the adapters, and its own weights are only read: leave "none"',
    "modules_to_save": f"whole modules would be trained from a copy of weights that are not in memory: {_BUILT}",
    "trainable_token_indices": f"rows of the embedding would be copied, which is not in memory: {_BUILT}",
    "use_dora": f"it begins with the norms of the weights, which are not in memory: {_BUILT}",
    "target_parameters": f"it adds to weights that are not modules, which are not in memory: {_BUILT}",
    "layer_replication": f"it makes another model of this one: {_BUILT}",
}
_CLASSIFIERS: Final = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT trains the last layer as a whole, without having been told to."""


def peft() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import peft as found
    except ImportError as error:
        raise UsageError(
            f"LoRA needs the package peft, which cannot be imported ({error}): pip install peft, or "
            "pip install 'penstock[lora]'"
        ) from error
    return found


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put adapters into a module."""
    if sys.modules.get("peft") is None:  # then it cannot be: no import for those who do not use it
        return False
    library = peft()
    kinds = (library.PeftModel, library.PeftMixedModel, library.tuners.tuners_utils.BaseTunerLayer)
    return any(isinstance(child, kinds) for child in module.modules())


def without_adapters(model: Any) -> Any:
    """The model that PEFT has wrapped; any other as it is."""
    if sys.modules.get("peft") is not None and isinstance(model, peft().PeftModel):
        return model.get_base_model()
    return model


def check_config(config: Any) -> None:
    """See that adapters of these settings can be put on a model whose weights are not in memory.

    Raises:
        UsageError: they cannot.
    """
    if not isinstance(config, peft().LoraConfig):
        raise UsageError(f"lora is a {type(config).__name__}: give a peft.LoraConfig. Of other methods, {_BUILT}")
    if config.init_lora_weights not in _INITS:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} begins with a pass over the model's weights, which are "
            f'not in memory: use True or "gaussian"; or {_BUILT}'
        )
    if str(getattr(config.task_type, "value", config.task_type)) in _CLASSIFIERS:
        raise UsageError(
            f"task_type={config.task_type} trains the model's last layer as a whole, too, from a copy of weights that "
            f"are not in memory: leave task_type out; or {_BUILT}"
        )
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in _FREE and value != default and value:
            remedy = _REMEDIES.get(
                field.name, f"it is not known to work with weights that stream: leave it out; or {_BUILT}"
            )
            raise UsageError(f"LoraConfig({field.name}={value!r}): {remedy}")


def put(model: nn.Module, config: Any) -> nn.Module:
    """Put new adapters into a model, whose parameters are frozen. Gives what PEFT makes of it, a `PeftModel`.

    Raises:
        UsageError: the model has no such modules, or the settings have no meaning.
    """
    check_config(config)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for what has another name since; nobody who uses the two can do anything about it.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            made: nn.Module = peft().get_peft_model(model, copy.deepcopy(config))  # which writes into it
    except ValueError as error:
        raise UsageError(f"PEFT cannot put these adapters into a {type(model).__name__}: {error}") from error
    return made


@contextmanager
def put_if_built(model: Any, config: Any) -> Iterator[Any]:
    """A module with new adapters in it, which are taken out again where what follows fails; anything else as it is.

    Args:
        model: A module that is built, or where a checkpoint is.
        config: A `peft.LoraConfig`; None for no adapters.

    Raises:
        UsageError: as `put`.
    """
    if config is None or not isinstance(model, nn.Module):
        yield model
        return
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    made: Any = put(model, config)
    try:
        yield made
    except BaseException:
        made.unload()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        raise


def as_text(model: Any) -> str:
    """The settings of a model's adapters, as adapter_config.json has them."""
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = False
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.dumps(found, indent=2, sort_keys=True)


def from_text(text: str) -> Any:
    """The settings that `as_text` wrote."""
    return peft().PeftConfig.from_peft_type(**json.loads(text))


def beside(
    config: Any = None,
    *,
    arrays: int,
    accumulate: int,
    activations: Activations = "keep",
    trained: Sequence[str] | None = None,
) -> Beside:
    """How a model gets its adapters, and what training takes.

    Args:
        config: A `peft.LoraConfig`; None where the model has them already.
        arrays: Of each shard: masters and states.
        accumulate: Backward passes of a step.
        activations: What becomes of them.
        trained: Names of the parameters that a run trains which goes on; None for all that want a gradient.
    """

    def given(model: nn.Module) -> nn.Module:
        made = model if config is None else put(model, config)
        if trained is not None:
            only_trained(made, trained)
        for parameter in trained_in(made).values():
            if not parameter.data.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return made

    return Beside(put=given, changing=partial(changing, arrays=arrays, accumulate=accumulate, activations=activations))


def changing(
    parameters: Sequence[nn.Parameter],
    device: Device,
    *,
    arrays: int,
    accumulate: int,
    activations: Activations = "keep",
) -> Changing:
    """What it takes to train these beside frozen weights on a device; see `changing_on`."""
    return changing_on(
        parameters,
        separate=device.separate,
        emulated=device.separate and device.torch_device.type == "cpu",
        arrays=arrays,
        accumulate=accumulate,
        activations=activations,
    )


def changing_on(
    parameters: Sequence[nn.Parameter],
    *,
    separate: bool,
    emulated: bool,
    arrays: int,
    accumulate: int,
    activations: Activations = "keep",
) -> Changing:
    """What it takes to train these beside frozen weights.

    In host memory: masters and states; gradients, in fp32 where several are added up; one of them in fp32 for the norm;
    what updates compute with; the weights, or on a device apart a copy of them that updates write, and what gradients
    leave it through that are added up.

    Args:
        parameters: Of the adapters.
        separate: Whether the device has memory of its own.
        emulated: Whether that is a part of the host's, which the same tensors lie in.
        arrays: Of each shard: masters and states.
        accumulate: Backward passes of a step.
        activations: What becomes of them.
    """
    shards = cut_shards([parameter.numel() for parameter in parameters], {0: range(len(parameters))})
    wide = accumulate > 1
    gradients = sum(round_up(p.numel() * (4 if wide else p.element_size()), ALIGN) for p in parameters)
    norm = 0 if wide else max((4 * p.numel() for p in parameters if p.dtype != torch.float32), default=0)
    sizes = [parameter.nbytes for parameter in parameters]
    weights = sum(sizes)
    states = sum(arrays * shard.array_nbytes for shard in shards) + BUFFERS * PAGE
    ring = min(2 * max(sizes, default=0), weights) if separate and wide else 0
    own = states + gradients + norm + 2 * 12 * SUBCHUNK + (0 if emulated else weights) + ring
    moving = activation_room(activations, None)
    return replace(
        moving,
        own_nbytes=own + moving.own_nbytes,
        own_device_nbytes=weights if separate else 0,
        block_nbytes=sys.maxsize,
        frozen=True,
    )
