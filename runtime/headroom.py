"""What a run needs besides weights, estimated from the config: KV cache, activations, logits, the framework itself."""

from __future__ import annotations

from typing import Any, Final

import torch

from .cachesize import cache_size, first_of

FRAMEWORK: Final = 224 * 2**20
"""Allocator slack, thread stacks, kernels' own buffers, lazily imported modules, and the pages of shared libraries,
which must stay cached: under a tight control group, evicting them costs far more than the weights in their place
save."""
DEFAULT_CONTEXT: Final = 512
DEFAULT_BATCH: Final = 1


def kv_nbytes(config: Any, dtype: torch.dtype, *, context: int | None, batch: int | None) -> int:
    """Bytes of keys and values of such a run. What encodes and decodes may be given as many tokens and make as many."""
    tokens, itemsize = context or DEFAULT_CONTEXT, torch.empty((), dtype=dtype).element_size()
    return (batch or DEFAULT_BATCH) * cache_size(config).elements(tokens=tokens, sources=tokens) * itemsize


def headroom_nbytes(config: Any, dtype: torch.dtype, *, context: int | None, batch: int | None) -> int:
    """Bytes to leave free for a run of `batch` sequences of up to `context` tokens.

    Keys and values as `cachesize` has them. Activations of a prefill: a few hidden and feed-forward vectors per
    token. Logits: two fp32 copies of the last position.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    tokens = (context or DEFAULT_CONTEXT) * (batch or DEFAULT_BATCH)
    itemsize = torch.empty((), dtype=dtype).element_size()
    hidden = first_of(text, ("hidden_size", "d_model", "n_embd"), 1024)
    ffn = first_of(text, ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim"), 4 * hidden)
    vocabulary = first_of(text, ("vocab_size",), 0)
    kv = kv_nbytes(config, dtype, context=context, batch=batch)
    activations = (6 * hidden + 3 * ffn) * itemsize * tokens
    logits = 2 * 4 * vocabulary * (batch or DEFAULT_BATCH)
    return FRAMEWORK + kv + activations + logits
