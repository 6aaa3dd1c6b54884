"""A transformers model from a checkpoint folder or a Hub id, without its weights: the skeleton that gets streamed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import huggingface_hub
import torch
import transformers
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import _get_dtype
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.monkey_patching import patch_output_recorders
from transformers.utils import logging as transformers_logging

from ..memory.checkpoint import Checkpoint
from ..memory.errors import CheckpointError
from .conversion import Source, bind_sources
from .dtypes import parse_dtype
from .symbolic import symbol

logger = logging.getLogger(__name__)

_WANTED: Final = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
# Sub-folders and `consolidated` files hold the same weights once more, in another program's layout.
_UNWANTED: Final = ["*/*", "consolidated*"]

_PREFERRED: Final = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """A model that has everything but its weights, and where each of those lies."""

    model: PreTrainedModel
    """In eval mode, tied, with its generation config; parameters and persistent buffers on the meta device, other
    buffers real."""
    checkpoint: Checkpoint
    sources: Mapping[str, Source]
    """By the names of the model's `named_parameters()` and persistent buffers; of tied names only the first."""
    dtypes: Mapping[str, torch.dtype]
    """What each key of `sources` is cast to when it is read."""
    config: PreTrainedConfig


def skeleton(
    path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Skeleton:
    """Build the model of a checkpoint without reading its weights.

    `path` is a folder or a Hub id (HF_HUB_OFFLINE is honoured). `dtype` is "auto" (what the config says, else what the
    checkpoint is stored in) or a dtype. The model is the one `from_pretrained` would give, except that its weights are
    on the meta device: memory taken does not depend on their size.

    Raises CheckpointError, in one line with a remedy, where the checkpoint cannot be found, believed or built;
    UsageError for an unknown dtype.
    """
    wanted = parse_dtype(dtype)
    folder = locate(path, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    _check_config(config, folder, len(checkpoint.tensors), trust_remote_code=trust_remote_code)
    first = {name: symbol(source) for name, source in checkpoint.tensors.items()}
    try:
        model_class = _model_class(config, folder, trust_remote_code=trust_remote_code)
        config, wanted = _get_dtype(wanted or "auto", None, config, None, first, True)
        config.name_or_path = os.fspath(path)
        with ExitStack() as stack:
            for context in model_class.get_init_context(wanted, False, False, False):
                stack.enter_context(context)
            model = model_class(config)
            patch_output_recorders(model)
        with _no_progress_bar():
            sources = bind_sources(model, checkpoint, dtype=wanted)
        _set_generation_config(model, folder, trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # a config may make any line of a model's code fail, in any way
        raise CheckpointError(
            f"{folder}: its config.json does not describe a model that can be built ({_one_line(error)}); "
            "restore the config.json that was saved with these weights"
        ) from error
    model.train(False)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    dtypes = {name: tensors[name].dtype for name in sources}
    return Skeleton(model=model, checkpoint=checkpoint, sources=sources, dtypes=dtypes, config=model.config)


def outline(
    path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that a config describes, all of it on the meta device; no weights are needed, read or fetched.

    Of `path`, a folder or a Hub id, only config.json is looked at. `dtype` "auto" is what the config says, else
    float32. The model is tied and in eval mode.

    Raises CheckpointError and UsageError as `skeleton` does.
    """
    wanted = parse_dtype(dtype)
    folder = locate(path, trust_remote_code=trust_remote_code, patterns=["config.json"])
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    _check_config(config, folder, None, trust_remote_code=trust_remote_code)
    try:
        model_class = _model_class(config, folder, trust_remote_code=trust_remote_code)
        inner = (getattr(each, "dtype", None) for each in _configs(config))
        stated = next((each for each in inner if each is not None), torch.float32)
        config, wanted = _get_dtype(wanted or stated, None, config, None, {}, True)
        config.name_or_path = os.fspath(path)
        with ExitStack() as stack:
            for context in model_class.get_init_context(wanted, False, False, False):
                stack.enter_context(context)
            model: PreTrainedModel = model_class(config)
        model.tie_weights()
    except CheckpointError:
        raise
    except Exception as error:  # a config may make any line of a model's code fail, in any way
        raise CheckpointError(
            f"{folder}: its config.json does not describe a model that can be built ({_one_line(error)}); correct it"
        ) from error
    model.train(False)
    return model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def locate(path: str | os.PathLike[str], *, trust_remote_code: bool, patterns: Sequence[str] = _WANTED) -> str:
    """The folder of a checkpoint, downloaded where `path` is a Hub id: of it the files that match `patterns`."""
    name = os.fspath(path)
    if os.path.isdir(name):
        return os.path.abspath(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name}: not a folder; give the folder that holds config.json and the weights")
    try:
        validate_repo_id(name)
        is_hub_id = not isinstance(path, os.PathLike)
    except huggingface_hub.errors.HFValidationError:
        is_hub_id = False
    if not is_hub_id:
        raise CheckpointError(f"{name}: no such folder; give an existing folder or a Hub id such as owner/name")
    wanted = [*patterns, *(["*.py"] if trust_remote_code else [])]
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=_UNWANTED)
    except Exception as error:  # what a transport raises is no part of the client's interface
        raise CheckpointError(
            f"{name}: no such folder, and as a Hub id it cannot be fetched ({_one_line(error)}); check the spelling, "
            "the network, HF_HUB_OFFLINE, and `hf auth login` for a gated model"
        ) from error


def _read_config(folder: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise CheckpointError(
            f"{folder}: holds an adapter, which is not applied; merge it first (peft: merge_and_unload)"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config
    except Exception as error:  # configs validate themselves, each class in its own way
        hint = (
            "correct it"
            if trust_remote_code
            else "correct it, or allow its own code by trust_remote_code=True (--trust-remote-code)"
        )
        raise CheckpointError(f"{folder}: config.json cannot be used ({_one_line(error)}); {hint}") from error


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner)


def _counts_modules(key: str) -> bool:
    return "layer" in key or "depth" in key or (key.startswith(("n_", "num_")) and "expert" in key)


def _check_config(config: PreTrainedConfig, folder: str, tensors: int | None, *, trust_remote_code: bool) -> None:
    """Refuse what cannot be streamed, would run code, or would build modules without end.

    `tensors` is how many the checkpoint has; None where its weights are not looked at.
    """
    for each in _configs(config):
        quantised = getattr(each, "quantization_config", None)
        if quantised is not None:
            settings = quantised if isinstance(quantised, dict) else vars(quantised)
            method = settings.get("quant_method", "unnamed")
            raise CheckpointError(
                f"{folder}: is quantised ({getattr(method, 'value', method)}), which is not supported; use "
                "the bf16, fp16 or fp32 checkpoint it was made from"
            )
        for key, value in vars(each).items():
            if _counts_modules(key) and type(value) is int and value > max(1000, tensors or 0):
                against = "which no model has" if tensors is None else f"but the weights are {tensors} tensors"
                raise CheckpointError(
                    f"{folder}: its config says {key}={value}, {against}; restore the config.json that was saved with "
                    "these weights"
                )
            # "owner/name" as an implementation makes transformers fetch a kernel from the Hub and run it.
            if "_implementation" in key and "/" in str(value) and not trust_remote_code:
                raise CheckpointError(
                    f"{folder}: its config asks for the code {str(value)!r} ({key}); remove that line, or "
                    "allow it by trust_remote_code=True (--trust-remote-code)"
                )


def _auto_classes() -> list[str]:
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModelFor")]
    return [*(name for name in _PREFERRED if name in names), *sorted(set(names) - set(_PREFERRED)), "AutoModel"]


def _model_class(config: PreTrainedConfig, folder: str, *, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class that `architectures` names, found through the auto classes; else what AutoModel gives."""
    named = config.architectures[0] if config.architectures else None
    if trust_remote_code:
        remote = _remote_class(config, folder, named)
        if remote is not None:
            return remote
    for name in _auto_classes():
        auto = getattr(modeling_auto, name)
        if type(config) not in getattr(auto, "_model_mapping", ()):
            continue
        found = auto._model_mapping[type(config)]
        for candidate in found if isinstance(found, tuple | list) else (found,):
            if candidate.__name__ == named or name == "AutoModel":
                if candidate.__name__ != named:
                    logger.warning("%s: no class %s in transformers; building %s", folder, named, candidate.__name__)
                chosen: type[PreTrainedModel] = candidate
                return chosen
    raise CheckpointError(
        f"{folder}: transformers {transformers.__version__} has no model for {type(config).__name__} ({named}); "
        "use a newer transformers, or allow its own code by trust_remote_code=True (--trust-remote-code)"
    )


def _remote_class(config: PreTrainedConfig, folder: str, named: str | None) -> type[PreTrainedModel] | None:
    auto_map: Mapping[str, Any] = getattr(config, "auto_map", None) or {}
    references = [auto_map[name] for name in _auto_classes() if isinstance(auto_map.get(name), str)]
    references.sort(key=lambda reference: reference.rsplit(".", 1)[-1] != named)
    if not references:
        return None
    found = get_class_from_dynamic_module(references[0], folder)
    remote: type[PreTrainedModel] = add_generation_mixin_to_remote_model(found)  # type: ignore[no-untyped-call]
    return remote


def _set_generation_config(model: PreTrainedModel, folder: str, *, trust_remote_code: bool) -> None:
    adjust: Callable[..., None] | None = getattr(model, "adjust_generation_fn", None)
    if adjust is None or not model.can_generate():
        return
    adjust(
        None,
        True,
        None,
        folder,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision=None,
        subfolder="",
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar while it loads weights; here it loads none."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
