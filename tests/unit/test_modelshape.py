from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.memory.errors import CheckpointError, UsageError
from penstock.scheduler.modelconfig import published_shape, read_config, shape_of

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "head_dim": 32},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 24},
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 128,
        "vocab_size": 128,
        "word_embed_proj_dim": 64,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    "gpt_neox": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "vocab_size": 128,
    },
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128},
    "mixtral": {**LLAMA, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **LLAMA,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen3_moe": {**LLAMA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    "deepseek_v3": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "vocab_size": 128,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
}


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_the_model_that_transformers_builds(family: str) -> None:
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict()).parameters == sum(each.numel() for each in model.parameters())


def test_parameters_of_released_models() -> None:
    opt = published_shape({"name": "OPT-30B", "layers": 48, "hidden": 7168, "heads": 56, "ffn": 28672, "vocab": 50272})
    assert opt.parameters == pytest.approx(29.97e9, rel=1e-3)
    bloom = published_shape({"name": "BLOOM-176B", "layers": 70, "hidden": 14336, "heads": 112})
    assert bloom.parameters == 176_247_271_424
    llama = published_shape(
        {"name": "Llama3-70B", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256}
    )
    assert llama.parameters == 70_553_706_496
    assert llama.kv_nbytes * llama.depth == 327_680


def test_layers_touch_experts_as_tokens_choose_them() -> None:
    shape = shape_of({"model_type": "mixtral", **CONFIGS["mixtral"]})
    expert = next(each for each in shape.layers[0].matrices if each.role == "expert")
    assert expert.touched(1) == pytest.approx(2)
    assert expert.touched(1000) == pytest.approx(6)
    one = sum(each.nbytes for each in shape.linear(shape.layers[0], 1))
    many = sum(each.nbytes for each in shape.linear(shape.layers[0], 1000))
    assert one < many == pytest.approx(sum(m.parameters for m in shape.layers[0].matrices) * shape.itemsize)


def test_attention_bytes_are_those_of_the_cache() -> None:
    shape = shape_of({"model_type": "llama", **LLAMA})
    operation = shape.attention(5, 1, 7)
    assert operation.nbytes == 5 * 7 * 2 * 2 * 16 * 2
    assert operation.rows == 2


def test_an_unknown_architecture_is_estimated_and_says_so() -> None:
    shape = shape_of({"model_type": "novel", **LLAMA})
    assert shape.parameters == shape_of({"model_type": "llama", **LLAMA}).parameters
    assert "'novel' is not known" in shape.notes[0]


def test_an_unknown_architecture_without_sizes_names_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"lacks layers \(as num_hidden_layers .*; ffn"):
        shape_of({"model_type": "novel", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 10})


@pytest.mark.parametrize("value", [0, -3, 2.5, "many", True])
def test_absurd_figures_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="a whole number"):
        shape_of({"model_type": "llama", **LLAMA, "num_hidden_layers": value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_key_value_heads", 3, "one must divide the other"),
        ("head_dim", "wide", "head_dim = 'wide'"),
        ("num_experts_per_tok", 9, "uses 9 of 6 experts"),
    ],
)
def test_figures_that_do_not_go_together_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_of({"model_type": "mixtral", **CONFIGS["mixtral"], key: value})


def test_config_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(file)
    file.write_text("[1")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_config(tmp_path)
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match="is an object"):
        read_config(tmp_path)
    file.write_text(json.dumps({"model_type": "llama", "text_config": LLAMA}))
    assert read_config(file).depth == 3
