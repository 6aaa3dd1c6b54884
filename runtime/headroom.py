"""What a run needs besides weights, estimated from the config: KV cache, activations, logits, the framework itself."""

from __future__ import annotations

from typing import Any, Final

import torch

FRAMEWORK: Final = 224 * 2**20
"""Allocator slack, thread stacks, kernels' own buffers, lazily imported modules, and the pages of shared libraries,
which must stay cached: under a tight control group, evicting them costs far more than the weights in their place
save."""
DEFAULT_CONTEXT: Final = 512
DEFAULT_BATCH: Final = 1


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def kv_nbytes(config: Any, dtype: torch.dtype, *, context: int | None, batch: int | None) -> int:
    """Bytes of keys and values of such a run: 2 · layers · kv heads · head size per token."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers = _first(text, ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers"), 12)
    hidden = _first(text, ("hidden_size", "d_model", "n_embd"), 1024)
    heads = _first(text, ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"), 16)
    kv_heads = _first(text, ("num_key_value_heads",), heads)
    head = _first(text, ("head_dim",), max(hidden // heads, 1))
    tokens = (context or DEFAULT_CONTEXT) * (batch or DEFAULT_BATCH)
    return 2 * layers * kv_heads * head * torch.empty((), dtype=dtype).element_size() * tokens


def headroom_nbytes(config: Any, dtype: torch.dtype, *, context: int | None, batch: int | None) -> int:
    """Bytes to leave free for a run of `batch` sequences of up to `context` tokens.

    KV: 2 · layers · kv heads · head size per token. Activations of a prefill: a few hidden and feed-forward vectors per
    token. Logits: two fp32 copies of the last position.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    tokens = (context or DEFAULT_CONTEXT) * (batch or DEFAULT_BATCH)
    itemsize = torch.empty((), dtype=dtype).element_size()
    hidden = _first(text, ("hidden_size", "d_model", "n_embd"), 1024)
    ffn = _first(text, ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim"), 4 * hidden)
    vocabulary = _first(text, ("vocab_size",), 0)
    kv = kv_nbytes(config, dtype, context=context, batch=batch)
    activations = (6 * hidden + 3 * ffn) * itemsize * tokens
    logits = 2 * 4 * vocabulary * (batch or DEFAULT_BATCH)
    return FRAMEWORK + kv + activations + logits
