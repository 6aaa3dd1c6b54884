"""Carries out `penstock moe record`. Imported late: torch and transformers take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ...api import close, explain, load
from ...runtime.experts.recording import RoutingRecorder
from ...runtime.pretrained import locate
from ...sizes import format_size
from ..generation import check_continues, tell_experts
from ..output import Output
from ..request import Request
from ..text import encode, find_tokenizer


def carry_out(requests: Sequence[Request], out: Path, output: Output, *, force: bool) -> None:
    """Load, and continue one prompt after another while the routing is written down.

    Args:
        requests: At least one; they differ in prompts and numbers of tokens only.
        out: The trace.
        output: For the plan and what came of it.
        force: Whether a file that is there goes.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it advises on arguments of its own
    first = requests[0]
    with output.busy("loading"):
        folder = locate(first.checkpoint, trust_remote_code=first.trust_remote_code)
        tokenizer = find_tokenizer(folder, trust_remote_code=first.trust_remote_code)
        prompts = [encode(request.prompt, tokenizer, request.checkpoint) for request in requests]
        model = load(
            folder,
            max_memory=first.max_memory,
            device=first.device,
            dtype=first.dtype,
            disk=first.disk,
            context=max(len(p) + r.max_new_tokens for p, r in zip(prompts, requests, strict=True)),
            batch=1,
            trust_remote_code=first.trust_remote_code,
        )
    try:
        for prompt, request in zip(prompts, requests, strict=True):
            check_continues(model, prompt, request.max_new_tokens)
        output.notes.print(explain(model))
        if force:
            out.unlink(missing_ok=True)
        source = f"{first.checkpoint}, {len(prompts)} prompts, {sum(len(prompt) for prompt in prompts)} tokens"
        with RoutingRecorder(model, out, source=source) as recorder, output.busy("running"):
            if first.sampling.seed is not None:
                torch.manual_seed(first.sampling.seed)
            for prompt, request in zip(prompts, requests, strict=True):
                recorder.sequences(1)
                _continue(model, prompt, request)
        _tell(model, recorder, out, output)
    finally:
        close(model)


def _continue(model: Any, prompt: list[int], request: Request) -> None:
    input_ids = torch.tensor([prompt], device=model.device)
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=request.max_new_tokens,
        num_beams=1,
        num_return_sequences=1,
        **request.sampling.options(),
    )


def _tell(model: Any, recorder: RoutingRecorder, out: Path, output: Output) -> None:
    size = format_size(out.stat().st_size)
    output.notes.print(f"{recorder.steps} steps, {recorder.tokens} tokens; {size}", markup=False)
    if recorder.left_out:
        output.notes.print(
            f"{recorder.left_out} calls are left out: not all layers of experts ran in them", style="yellow"
        )
    tell_experts(model.penstock, output)
