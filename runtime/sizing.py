"""What a model will take, from its config alone: built without weights, and rehearsed without memory."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..scheduler.sizes import (
    Bytes,
    ModuleSize,
    Sizes,
    Workload,
    extrapolate,
    extrapolate_bytes,
    optimizer_nbytes,
    step_nbytes,
    training_peak,
)
from ..scheduler.tape import Tape
from .adapterbones import add_adapters
from .feeding import UnknownInputError, inputs_of, loss_of, takes, token_ids, with_context
from .pretrained import outline
from .rehearsal import TooLongError, Watch, make_fake, pattern, quietly, rehearsing, tensors_in, units

logger = logging.getLogger(__name__)

_SHORTER: Final = ((64, 128, 192), (6, 10, 14))
"""Contexts to rehearse instead where a model loops over its tokens. The first are whole chunks for those that have
chunks; the others are for those that take every token by itself."""
_ONLY: Final = "weights, gradients and optimizer states only"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rehearsed:
    """What a run takes besides weights and optimizer states."""

    peak: Bytes = field(default_factory=Bytes)
    sweep: Bytes = field(default_factory=Bytes)
    """The peak before the first gradient of a parameter is there."""
    aside: Bytes = field(default_factory=Bytes)
    """The peak of all but the gradients of parameters."""
    activations: Mapping[str, int] = field(default_factory=dict)
    """By unit."""
    kv: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure_sizes(
    path: str | os.PathLike[str],
    *,
    workload: Workload,
    dtype: str | torch.dtype = "auto",
    on_cpu: bool = True,
    trust_remote_code: bool = False,
) -> Sizes:
    """Work out what the model of a config takes under a workload. Takes seconds, and no memory to speak of.

    `path` is a folder or a Hub id; only config.json is looked at. `on_cpu` says whether the CPU computes.

    Raises:
        CheckpointError: the config cannot be found, or used.
        UsageError: the workload or the dtype has no meaning for this model.
    """
    model = outline(path, dtype=dtype, trust_remote_code=trust_remote_code)
    workload = with_context(model, workload)
    make_fake(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = _trained(model, workload)
    ran = _run(model, workload, checkpointing=False, on_cpu=on_cpu)
    static = _static(model, trained)
    peak, checkpointed, most = _inference(static, ran), None, static
    if workload.train is not None:
        step = max((step_nbytes(p.numel(), p.element_size()) for p in trained), default=0)
        peak = _training(static, ran, step)
        again = _run(model, workload, checkpointing=True, on_cpu=on_cpu)
        checkpointed = _training(static, again, step) if again.peak.total else None
    most = replace(
        static,
        activations=sum(ran.activations.values()),
        kv=sum(ran.kv.values()),
        workspace=max(peak.workspace, ran.peak.workspace),
    )
    return Sizes(
        model=os.fspath(path),
        architecture=type(model).__name__,
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in trained),
        dtype=str(model.dtype).removeprefix("torch."),
        workload=workload,
        most=most,
        peak=peak,
        checkpointed=checkpointed,
        block_nbytes=_largest_block(model),
        modules=_modules(model, ran),
        notes=ran.notes,
    )


def measure_activations(
    model: PreTrainedModel, workload: Workload, *, again: bool, on_cpu: bool
) -> tuple[Bytes | None, tuple[str, ...]]:
    """What a backward pass holds at most beside weights and the gradients of parameters; and notes.

    None where the model cannot be rehearsed, or cannot make its activations again.

    Args:
        model: With fake weights, those that are trained wanting a gradient. It is changed where activations are made
            again.
        workload: Which trains.
        again: Whether the layers' activations are made again in backward.
        on_cpu: Whether the CPU computes.
    """
    found = _run(model, workload, checkpointing=again, on_cpu=on_cpu)
    return (found.aside if found.aside.total else None), found.notes


def measure_step(model: PreTrainedModel, workload: Workload, *, checkpointing: bool, on_cpu: bool) -> int | None:
    """Bytes that a forward and a backward take beside weights and their gradients; None where that is not to be found.

    Args:
        model: On fake tensors. Checkpointing, once asked for, stays on.
        workload: Trains, with a context.
        checkpointing: Whether layers run again in backward; without, where the model does not know how.
        on_cpu: Whether the CPU computes.
    """
    ran = _run(model, workload, checkpointing=checkpointing, on_cpu=on_cpu)
    if checkpointing and not ran.peak.total:
        ran = _run(model, workload, checkpointing=False, on_cpu=on_cpu)
    for note in ran.notes:
        logger.debug("%s", note)
    return max(ran.sweep.total, ran.peak.total - ran.peak.gradients) or None


def _trained(model: PreTrainedModel, workload: Workload) -> list[nn.Parameter]:
    """Make parameters trainable, or add adapters that are; what is trained."""
    if workload.train == "adamw":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    elif workload.train == "lora":
        add_adapters(model, rank=workload.rank, targets=workload.targets, dropout=workload.dropout)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _static(model: nn.Module, trained: Sequence[nn.Parameter]) -> Bytes:
    return Bytes(
        weights=_weights(model),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(optimizer_nbytes(p.numel(), p.element_size()) for p in trained),
    )


def _largest_block(model: nn.Module) -> int:
    """Bytes of the largest parameter that is used whole: layers are cut down to that, and tables are read by rows."""
    whole = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return max((p.nbytes for p in model.parameters() if id(p) in whole), default=0)


def _weights(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {t.untyped_storage()._cdata: t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(storages.values())


def _inference(static: Bytes, ran: _Rehearsed) -> Bytes:
    return ran.peak + Bytes(weights=static.weights)


def _training(static: Bytes, ran: _Rehearsed, step: int) -> Bytes:
    return training_peak(
        weights=static.weights,
        optimizer=static.optimizer,
        gradients=static.gradients,
        sweep=ran.peak,
        step=step,
    )


def _run(model: PreTrainedModel, workload: Workload, *, checkpointing: bool, on_cpu: bool) -> _Rehearsed:
    """Rehearse the workload; with a note instead of figures where the model cannot be rehearsed."""
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            return _Rehearsed()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    name = type(model).__name__
    with quietly():
        for contexts in ((workload.context,), *_SHORTER):
            try:
                found = [_rehearse(model, replace(workload, context=context), on_cpu=on_cpu) for context in contexts]
            except TooLongError:
                continue
            except UnknownInputError as error:
                return _Rehearsed(notes=(f"{_ONLY}: {error}",))
            except Exception as error:  # a model's code may do anything that a tensor without values cannot
                logger.debug("rehearsal failed", exc_info=True)
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                return _Rehearsed(notes=(f"{_ONLY}: the forward of {name} asks for values ({text})",))
            return found[0] if len(found) == 1 else _extrapolated(contexts, found, workload.context)
    return _Rehearsed(notes=(f"{_ONLY}: the forward of {name} is too long",))


def _extrapolated(contexts: Sequence[int], found: Sequence[_Rehearsed], context: int) -> _Rehearsed:
    def by_unit(each: Sequence[Mapping[str, int]]) -> dict[str, int]:
        names = dict.fromkeys(name for one in each for name in one)
        return {name: extrapolate(contexts, [one.get(name, 0) for one in each], context) for name in names}

    # Gradients do not grow with the context: where they make the peak of a short one, activations make that of a long
    # one.
    sweep = extrapolate_bytes(contexts, [each.sweep for each in found], context)
    return _Rehearsed(
        peak=max(sweep, found[-1].peak, key=lambda each: each.total),
        sweep=sweep,
        aside=extrapolate_bytes(contexts, [each.aside for each in found], context),
        activations=by_unit([each.activations for each in found]),
        kv=by_unit([each.kv for each in found]),
        notes=(
            f"extrapolated from contexts of {', '.join(map(str, contexts))}: this model loops over its tokens",
            *found[-1].notes,
        ),
    )


def _rehearse(model: PreTrainedModel, workload: Workload, *, on_cpu: bool) -> _Rehearsed:
    with rehearsing(model, Tape(), on_cpu=on_cpu) as watch:
        if workload.train is not None:
            found = _train(model, watch, workload)
        else:
            with torch.no_grad():
                found = _infer(model, watch, workload)
    if watch.asked:
        note = f"the forward of {type(model).__name__} asks whether values are so or so: the answer given was no"
        return replace(found, notes=(*found.notes, note))
    return found


def _infer(model: PreTrainedModel, watch: Watch, workload: Workload) -> _Rehearsed:
    kv: Mapping[str, int] = {}
    if model.can_generate() and (takes(model, "past_key_values") or takes(model, "cache_params")):
        kv = (_translate if model.config.is_encoder_decoder else _continue)(model, watch, workload)
    else:
        model(**inputs_of(model, workload), **_decoder_start(model))
    return _Rehearsed(peak=watch.tape.peak(), sweep=watch.tape.peak(), kv=kv)


def _decoder_start(model: PreTrainedModel) -> dict[str, Tensor]:
    return {"decoder_input_ids": token_ids(1, 1)} if model.config.is_encoder_decoder else {}


def _train(model: PreTrainedModel, watch: Watch, workload: Workload) -> _Rehearsed:
    tape = watch.tape
    model.train()
    try:
        loss = loss_of(model, workload)
        tape.mark(tape.live(), "activations")
        kept = tape.held("activations")
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [watch.note(p.grad) for p in model.parameters() if p.grad is not None]
        tape.mark((number for number in gradients if number is not None), "gradients")
        return _Rehearsed(
            peak=tape.peak(),
            sweep=tape.peak(before="gradients"),
            aside=tape.peak(without="gradients"),
            activations=kept,
        )
    finally:
        model.train(False)
        model.zero_grad()


def _continue(model: PreTrainedModel, watch: Watch, workload: Workload) -> dict[str, int]:
    """A prompt that fills the context but for one token, and that token. Bytes of the cache at the end, by unit."""
    ids = token_ids(workload.batch, workload.context - 1)
    name = "past_key_values" if takes(model, "past_key_values") else "cache_params"
    cache = _turn(model, watch, name, input_ids=ids)
    # As with every turn of generate: the cache goes in, and comes out longer.
    cache = _turn(model, watch, name, input_ids=ids[:, -1:], **{name: cache})
    return _held_by(watch, cache)


def _translate(model: PreTrainedModel, watch: Watch, workload: Workload) -> dict[str, int]:
    """The encoder, the first token of the decoder, and the last one that the context has room for."""
    encoded = model.get_encoder()(**inputs_of(model, workload))
    ids = token_ids(workload.batch, max(workload.context - 1, 1))
    _turn(model, watch, "past_key_values", encoder_outputs=encoded, decoder_input_ids=ids[:, :1])
    watch.recording = False  # the turns between: only the cache that they leave matters
    cache = _turn(model, watch, "past_key_values", encoder_outputs=encoded, decoder_input_ids=ids)
    watch.recording = True
    _mark_cache(watch, cache)
    cache = _turn(
        model, watch, "past_key_values", encoder_outputs=encoded, decoder_input_ids=ids[:, :1], past_key_values=cache
    )
    return _held_by(watch, cache)


def _turn(model: PreTrainedModel, watch: Watch, name: str, **inputs: Any) -> Any:
    """One turn of transformers' generate: the cache that it leaves."""
    keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    output = model(**inputs, **keep, use_cache=True)
    cache = getattr(output, name, None)
    _mark_cache(watch, cache)
    output.logits[:, -1, :].to(torch.float32, copy=True)
    return cache


def _mark_cache(watch: Watch, cache: object) -> None:
    if watch.recording:
        numbers = [watch.note(tensor) for tensor in tensors_in(cache)]
        watch.tape.mark((number for number in numbers if number is not None), "kv")


def _held_by(watch: Watch, cache: object) -> dict[str, int]:
    found: dict[int, tuple[str, int]] = {}
    for tensor in tensors_in(cache):
        number = watch.note(tensor)
        if number is not None:
            piece = watch.tape.pieces[number]
            found[number] = (piece.unit, piece.nbytes)
    totals: dict[str, int] = defaultdict(int)
    for unit, nbytes in found.values():
        totals[unit] += nbytes
    return dict(totals)


def _modules(model: nn.Module, ran: _Rehearsed) -> tuple[ModuleSize, ...]:
    """What each module takes; tied weights count where they come first."""
    counts: Counter[str] = Counter()
    owned: dict[str, list[Tensor]] = defaultdict(list)
    seen: set[int] = set()

    def own(name: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                owned[name].append(tensor)

    for path, module in units(model):
        counts[pattern(path)] += 1
        own(pattern(path), (*module.parameters(), *module.buffers()))
    own("(others)", (*model.parameters(), *model.buffers()))
    counts["(others)"] += bool(owned["(others)"])
    rows = [
        ModuleSize(
            path=name,
            count=count,
            weights=sum(tensor.nbytes for tensor in owned[name]),
            gradients=sum(tensor.nbytes for tensor in owned[name] if tensor.requires_grad),
            optimizer=sum(optimizer_nbytes(t.numel(), t.element_size()) for t in owned[name] if t.requires_grad),
            activations=ran.activations.get(name, 0),
            kv=ran.kv.get(name, 0),
        )
        for name, count in counts.items()
        if count
    ]
    return tuple(sorted((row for row in rows if row.total), key=lambda row: -row.total))
