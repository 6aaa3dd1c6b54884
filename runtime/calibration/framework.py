"""What a model's own Python costs: the time that a transformer takes whose tensors are too small to matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
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
BETWEEN_NBYTES: Final = 4 * 2**20
"""Of weights that each linear layer of a model reads at least, if the model is worth streaming."""
CIRCLE: Final = 16
"""So many of them, one after the other: they come from memory, not from caches."""


@torch.no_grad()
def framework_cost(device: torch.device, *, seconds: float, timer: Timer, clock: Clock = perf_counter) -> Figure:
    """Seconds per operation of a decoding transformer, Python, module calls and launch included.

    Operations in a loop cost a part of that: between those of a model lie its own Python, and products that fill the
    caches with weights. Such a product follows each linear layer here, too, and its own time does not count.

    Args:
        device: What computes.
        seconds: About so long.
        timer: By the host's clock.
        clock: The same clock.
    """
    with quietly():
        model, token, launches = _decoding(device)
        with _products_between(model, device, clock) as spent_s:

            def once() -> float:
                before = spent_s()
                return max(timer.seconds(token) - (spent_s() - before), 0.0) / launches

            for _ in range(3):
                token()
            return in_turns({1: once}, seconds=seconds, clock=clock, pick=min)[1]


@contextmanager
def _products_between(model: nn.Module, device: torch.device, clock: Clock) -> Iterator[Callable[[], float]]:
    """While entered, another product follows each linear layer, and what is entered tells how long they took in all.

    Not on a GPU: there the host runs ahead, and products take none of its caches.
    """
    spent = 0.0
    if device.type != "cpu":
        yield lambda: 0.0
        return
    width = 1024
    x = torch.full((1, width), 0.5)
    weights = torch.full((CIRCLE, BETWEEN_NBYTES // 4 // width, width), 0.02)
    calls = 0

    def multiply(*_: object) -> None:
        nonlocal spent, calls
        start = clock()
        functional.linear(x, weights[calls % CIRCLE])
        calls += 1
        spent += clock() - start

    hooks = [module.register_forward_hook(multiply) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield lambda: spent
    finally:
        for hook in hooks:
            hook.remove()


def decoding_token(device: torch.device) -> Callable[[], None]:
    """Computes a token of that transformer, which is nearly all Python."""
    with quietly(), torch.no_grad():
        _, token, _ = _decoding(device)
    return torch.no_grad()(token)


def _decoding(device: torch.device) -> tuple[nn.Module, Callable[[], None], int]:
    """A model, what computes a token with it, and the operations that takes."""
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

    return model, token, launches
