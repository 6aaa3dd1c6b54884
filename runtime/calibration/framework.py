"""What a model's own Python costs: the time that a transformer takes whose tensors are too small to matter."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...scheduler.sizes import Workload
from ..programs import programs
from ..rehearsal import make_fake, quietly
from .sampling import Clock, Figure, in_turns
from .timing import Timer

_CONFIG: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PROMPT: Final = 8


@torch.no_grad()
def framework_cost(device: torch.device, *, seconds: float, timer: Timer, clock: Clock = perf_counter) -> Figure:
    """Seconds per operation of a decoding transformer, Python, module calls and launch included.

    Operations in a loop cost a part of that: between those of a model lie its own Python, and caches that it filled.

    Args:
        device: What computes.
        seconds: About so long.
        timer: By the host's clock.
        clock: Seconds since any moment, for `seconds` only.
    """
    with quietly():
        token, launches = _decoding(device)
        for _ in range(3):
            token()
        return in_turns({1: lambda: timer.seconds(token) / launches}, seconds=seconds, clock=clock, pick=min)[1]


def decoding_token(device: torch.device) -> Callable[[], None]:
    """Computes a token of that transformer, which is nearly all Python."""
    with quietly(), torch.no_grad():
        token, _ = _decoding(device)
    return torch.no_grad()(token)


def _decoding(device: torch.device) -> tuple[Callable[[], None], int]:
    """Computes a token; and the operations that takes."""
    config = LlamaConfig(**_CONFIG)
    rehearsed = LlamaForCausalLM(config).train(False)
    make_fake(rehearsed)
    calls = programs(rehearsed, Workload(batch=1, context=PROMPT + 2), prompt=PROMPT)
    launches = sum(operation.launches for operation in calls[-1].operations())
    model = LlamaForCausalLM(config).train(False)
    nn.Module.to(model, device)
    ids = torch.ones(1, PROMPT, dtype=torch.long, device=device)
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def token() -> None:
        output = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        output.logits[:, -1, :].to(torch.float32, copy=True).argmax(-1)
        cache.crop(-1)

    return token, launches
