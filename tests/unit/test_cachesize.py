"""What configs say of a cache, against the tensors that transformers puts into one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import ZOO

from penstock.runtime.cachesize import cache_size
from penstock.runtime.headroom import kv_nbytes
from penstock.runtime.throughput_sizes import footprint_of

ROWS, TOKENS, SOURCES = 2, 7, 11
LATENT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
"""Of multi-head latent attention, with an indexer where the model has one."""


def tensors(cache: Any) -> list[torch.Tensor]:
    """All that a cache keeps of tokens."""
    if hasattr(cache, "self_attention_cache"):
        return tensors(cache.self_attention_cache) + tensors(cache.cross_attention_cache)
    kept = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return [value for value in kept if value.is_floating_point()]


@torch.no_grad()
def kept_elements(model: Any, **more: torch.Tensor) -> float:
    """Of one sequence, in a cache that the model has filled."""
    ids = torch.randint(3, 60, (ROWS, TOKENS))
    inputs = {"decoder_input_ids": ids, **more} if more else {"input_ids": ids}
    cache = model(**inputs, use_cache=True).past_key_values
    return sum(tensor.numel() for tensor in tensors(cache)) / ROWS


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "opt", "phi3", "falcon", "mixtral", "qwen3-moe"])
def test_decoders(name: str) -> None:
    """Grouped and single heads, sliding windows shorter than what was given."""
    model: Any = ZOO[name].build()
    assert cache_size(model.config).elements(tokens=TOKENS, sources=0) == kept_elements(model)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "hy_v4", "minicpm3"])
def test_latent_attention(name: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **LATENT)).eval()
    assert cache_size(model.config).elements(tokens=TOKENS, sources=0) == kept_elements(model)


def test_deepseek_v3_as_it_is_published() -> None:
    """61 layers keep 512 + 64 elements of each token: 28 times less than its heads' keys and values would be."""
    size = cache_size(transformers.DeepseekV3Config())
    assert size.token_elements == 61 * 576
    assert kv_nbytes(transformers.DeepseekV3Config(), torch.bfloat16, context=1000, batch=3) == 61 * 576 * 2 * 3000


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_keeps_what_it_makes_of_the_encoders_output(name: str) -> None:
    model: Any = ZOO[name].build()
    given = torch.randint(3, 60, (ROWS, SOURCES))
    kept = kept_elements(model, input_ids=given)
    assert cache_size(model.config).elements(tokens=TOKENS, sources=SOURCES) == kept


def test_sound_has_one_length() -> None:
    model: Any = ZOO["whisper"].build()
    given = ZOO["whisper"].inputs()["input_features"]
    kept = kept_elements(model, input_features=given)
    assert cache_size(model.config).sources == 32
    assert cache_size(model.config).elements(tokens=TOKENS, sources=given.shape[-1]) == kept


def test_widths_and_depths_of_t5_are_its_own() -> None:
    """Heads that together are not as wide as the model, and a decoder that is not as deep as the encoder."""
    config = transformers.T5Config(
        vocab_size=64, d_model=24, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=5, num_heads=3, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    kept = kept_elements(model, input_ids=torch.randint(3, 60, (ROWS, SOURCES)))
    assert cache_size(config).elements(tokens=TOKENS, sources=SOURCES) == kept == 5 * 2 * 3 * 16 * (TOKENS + SOURCES)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_token_of_many_prompts_is_given_or_new(name: str) -> None:
    """Given ones are the encoder's, new ones the decoder's: each has keys and values once."""
    model: Any = ZOO[name].build()
    size = cache_size(model.config)
    found = footprint_of(model.config, torch.float32, reserved=True)
    assert found.kv_nbytes_per_token == 4 * size.source_elements == 4 * size.token_elements
    joined = footprint_of(model.config, torch.float32, reserved=False)
    assert found.activation_nbytes_per_token == joined.activation_nbytes_per_token > 0
