"""Carries out `penstock run`. Imported late: torch and transformers take seconds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..api import close, explain, load
from ..memory.errors import UsageError
from ..runtime.handle import Handle
from ..runtime.pretrained import locate
from ..scheduler.plan import Home, Plan
from .kv_cache import KvRoom, chunks, make_cache, read_config
from .kv_cache import render as render_kv
from .kv_option import check_context
from .output import Output
from .pace import Pace, Stopwatch, measure, render
from .progress import first_sweep
from .request import Request
from .text import Relay, decode, encode, find_tokenizer, writer_for


def carry_out(request: Request, output: Output) -> None:
    """Load, tell the plan, generate, tell the pace."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it advises on arguments of its own
    watch = Stopwatch()
    with output.busy("loading"):
        folder = locate(request.checkpoint, trust_remote_code=request.trust_remote_code)
        tokenizer = find_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        prompt = encode(request.prompt, tokenizer, request.checkpoint)
        context = check_context(request.context, len(prompt) + request.max_new_tokens)
        model = _load(request, folder, context)
    cache = None
    try:
        handle: Handle = model.penstock
        watch.loaded(lambda: handle.statistics().waited_s)
        check_continues(model, prompt, request.max_new_tokens)
        output.notes.print(explain(model))
        cache = None if request.kv is None else make_cache(model, request.kv, request.disk, request.device, tokenizer)
        writer = None if request.as_json else writer_for(tokenizer)
        ids = _generate(model, prompt, request, writer, cache, watch, output)
        kv = None if cache is None else cache.statistics()
        pace = measure(watch, handle.plan, handle.timeline.records())
        for line in render(pace, handle.plan):
            output.notes.print(line)
        tell_experts(handle, output)
        if kv is not None:
            output.notes.print(render_kv(kv), markup=False)
        if request.as_json:
            document = _document(handle, pace, len(prompt), ids, decode(tokenizer, ids))
            output.write_json(document if kv is None else document | {"kv": kv})
    finally:
        try:
            if cache is not None:
                cache.close()
        finally:
            close(model)


def _load(request: Request, folder: str, context: int) -> Any:
    """The model, in what keys and values in tiers leave of memory."""
    with ExitStack() as stack:
        if request.kv is not None:
            config, dtype = read_config(folder, request.dtype, trust_remote_code=request.trust_remote_code)
            room = KvRoom(config=config, dtype=dtype, option=request.kv)
            context = room.planned_context(context)
            stack.enter_context(room.kept())
        return load(
            folder,
            max_memory=request.max_memory,
            device=request.device,
            dtype=request.dtype,
            disk=request.disk,
            context=context,
            batch=1,
            exact=request.exact,
            plan=request.plan,
            trust_remote_code=request.trust_remote_code,
        )


def check_continues(model: Any, prompt: list[int], max_new_tokens: int) -> None:
    """Refuse what `generate` would fail at in its own words, or worse, not fail at.

    Raises:
        UsageError: the model does not continue texts, a token is unknown to it, or the text would be too long for it.
    """
    kind = type(model).__name__
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise UsageError(f"a {kind} does not continue texts: use it from Python with penstock.load(path)")
    text = model.config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    unknown = [token for token in prompt if isinstance(vocabulary, int) and token >= vocabulary]
    if isinstance(vocabulary, int) and unknown:
        raise UsageError(f"the model knows the token ids 0 to {vocabulary - 1}; the prompt has {unknown[0]}")
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and not model.config.is_encoder_decoder and len(prompt) + max_new_tokens > longest:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; with --max-new-tokens {max_new_tokens} that is more than the "
            f"{longest} positions of this model: shorten one of them"
        )


def _generate(
    model: Any,
    prompt: list[int],
    request: Request,
    writer: Any | None,
    cache: Any | None,
    watch: Stopwatch,
    output: Output,
) -> list[int]:
    handle: Handle = model.penstock
    if request.sampling.seed is not None:
        torch.manual_seed(request.sampling.seed)
    input_ids = torch.tensor([prompt], device=model.device)
    total = 0 if handle.plan.resident else sum(block.nbytes for block in handle.plan.blocks)
    with ExitStack() as stack:
        stack.enter_context(first_sweep(output.notes, total, lambda: handle.statistics().disk_read_nbytes))

        def on_token() -> None:
            stack.close()  # the bar goes before the first word comes
            watch.token()

        relay = Relay(writer, on_token)
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request.max_new_tokens,
            num_beams=1,
            num_return_sequences=1,
            streamer=relay,
            **({} if cache is None else {"past_key_values": cache} | chunks(len(prompt), model)),
            **request.sampling.options(),
        )
    return relay.ids


def tell_experts(handle: Handle, output: Output) -> None:
    """How often experts were there, where they are blocks of their own."""
    experts = handle.statistics().experts
    if experts is not None:
        output.notes.print(
            f"experts that were there when they were asked for: {experts.decode.hit_rate:.1%} of {experts.decode.uses} "
            f"while decoding, {experts.prefill.hit_rate:.1%} of {experts.prefill.uses} in prompts",
            markup=False,
        )


def _document(handle: Handle, pace: Pace, prompt_tokens: int, ids: list[int], text: str | None) -> dict[str, object]:
    return {
        "text": text,
        "ids": ids,
        "prompt_tokens": prompt_tokens,
        "timings": pace,
        "plan": plan_summary(handle.plan),
        "statistics": handle.statistics(),
    }


def plan_summary(plan: Plan) -> dict[str, object]:
    """The plan without its list of blocks. All sizes in bytes."""
    homes: tuple[Home, ...] = ("device", "host", "disk")
    return {
        "device": plan.device,
        "emulated": plan.emulated,
        "resident": plan.resident,
        "weights_nbytes": plan.weights_nbytes,
        "homes": {home: {"blocks": plan.blocks_at(home), "nbytes": plan.home_nbytes(home)} for home in homes},
        "on_cpu": {"blocks": len(plan.on_cpu()), "nbytes": sum(block.nbytes for block in plan.on_cpu())},
        "host_nbytes": plan.host_nbytes,
        "host_budget_nbytes": plan.host_budget_nbytes,
        "device_nbytes": plan.device_nbytes,
        "device_budget_nbytes": plan.device_budget_nbytes,
        "slots": plan.slots,
        "slot_nbytes": plan.slot_nbytes,
        "disk_nbytes_per_sweep": plan.disk_nbytes_per_sweep,
        "link_nbytes_per_sweep": plan.link_nbytes_per_sweep,
        "expert_slots": plan.expert_slots,
        "expert_passing": plan.expert_passing,
        "expert_nbytes": plan.expert_nbytes,
        "links_nbytes_per_s": plan.links,
        "terms_s": plan.terms,
        "notes": plan.notes,
    }
