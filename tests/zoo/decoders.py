"""Decoder-only language models. Each has several layers of 64 KiB and more, so that 4 KiB alignment stays a detail."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .entry import Entry, Inputs, Outputs

VOCAB = 512
BATCH, LENGTH, NEW_TOKENS = 2, 12, 5

COMMON: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    **COMMON,
}


def token_ids(*, seed: int = 1, batch: int = BATCH, length: int = LENGTH, vocab: int = VOCAB) -> Tensor:
    """Random ids that avoid the special ones."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompt() -> dict[str, Tensor]:
    """Two rows of ids, the second padded on the left."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    ids[1, :3] = 0
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, inputs: Inputs) -> Outputs:
    """One forward over the prompt."""
    return {"logits": model(**inputs).logits}


def greedy(model: Any, inputs: Inputs) -> Outputs:
    """Greedy tokens, and the logits that chose them."""
    result = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return {"tokens": result.sequences, "logits": torch.stack(result.logits)}


def _decoder(name: str, model: type[nn.Module], config: Any, **options: Any) -> Entry:
    def make() -> nn.Module:
        made: nn.Module = model(config())
        return made

    return Entry(name=name, make=make, inputs=prompt, forward=logits, generate=greedy, **options)


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    """The smallest Llama of the zoo, or one that differs from it by `changes`."""
    return transformers.LlamaConfig(**{**LLAMA, **changes})


def _qwen3() -> transformers.Qwen3Config:
    return transformers.Qwen3Config(**LLAMA, tie_word_embeddings=True)


def _gemma3() -> transformers.Gemma3TextConfig:
    # The window is smaller than the prompt, and one layer in the middle sees all of it.
    layers = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2
    return transformers.Gemma3TextConfig(**LLAMA, sliding_window=4, layer_types=layers, query_pre_attn_scalar=16)


def _gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=4, n_head=4, **COMMON)


def _opt() -> transformers.OPTConfig:
    # An embedding narrower than the model brings in OPT's two projections.
    return transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        do_layer_norm_before=False,
        **COMMON,
    )


def _phi3() -> transformers.Phi3Config:
    return transformers.Phi3Config(**{**LLAMA, "num_hidden_layers": 4})


def _falcon() -> transformers.FalconConfig:
    return transformers.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
        **COMMON,
    )


def _mixtral() -> transformers.MixtralConfig:
    return transformers.MixtralConfig(
        **{**LLAMA, "intermediate_size": 96, "num_hidden_layers": 4}, num_local_experts=4, num_experts_per_tok=2
    )


def _qwen3_moe() -> transformers.Qwen3MoeConfig:
    return transformers.Qwen3MoeConfig(
        **{**LLAMA, "num_hidden_layers": 4},
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )


def _mamba() -> transformers.MambaConfig:
    return transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=64, state_size=8, num_hidden_layers=4, expand=2, use_mambapy=False, **COMMON
    )


DECODERS = (
    _decoder("llama", transformers.LlamaForCausalLM, llama_config),
    _decoder("llama-bf16", transformers.LlamaForCausalLM, llama_config, dtype=torch.bfloat16),
    # Nine tenths of this one are the table that embedding and head share.
    _decoder(
        "llama-wide-vocabulary",
        transformers.LlamaForCausalLM,
        lambda: llama_config(vocab_size=16_384, num_hidden_layers=3, tie_word_embeddings=True),
    ),
    _decoder("qwen3", transformers.Qwen3ForCausalLM, _qwen3),
    _decoder("gemma3", transformers.Gemma3ForCausalLM, _gemma3),
    _decoder("gemma3-bf16", transformers.Gemma3ForCausalLM, _gemma3, dtype=torch.bfloat16),
    _decoder("gpt2", transformers.GPT2LMHeadModel, _gpt2),
    _decoder("opt", transformers.OPTForCausalLM, _opt),
    _decoder("phi3", transformers.Phi3ForCausalLM, _phi3),
    _decoder("falcon", transformers.FalconForCausalLM, _falcon),
    _decoder("mixtral", transformers.MixtralForCausalLM, _mixtral),
    _decoder("mixtral-bf16", transformers.MixtralForCausalLM, _mixtral, dtype=torch.bfloat16),
    _decoder("qwen3-moe", transformers.Qwen3MoeForCausalLM, _qwen3_moe),
    _decoder("mamba", transformers.MambaForCausalLM, _mamba),
)
