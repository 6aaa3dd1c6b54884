"""Sizes from a config against the slow way: the same model with real tensors, counted one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from penstock.memory.errors import CheckpointError, UsageError
from penstock.runtime.rehearsal import tensors_in, units
from penstock.runtime.sizing import measure_sizes
from penstock.scheduler.sizes import Bytes, Sizes, Workload, optimizer_nbytes

VOCAB = 96
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA: dict[str, Any] = {
    **COMMON, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": VOCAB, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "decoder_start_token_id": 2, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", {**LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2LMHeadModel", {**COMMON, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
         "v_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1,
         "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "mamba": ("MambaForCausalLM", {**COMMON, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
                                   "use_mambapy": False}),
    "t5": ("T5ForConditionalGeneration", {**COMMON, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                                          "num_heads": 4, "decoder_start_token_id": 0}),
    "whisper": ("WhisperForConditionalGeneration", SPEECH),
    "vit": ("ViTForImageClassification", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                          "num_attention_heads": 4, "image_size": 16, "patch_size": 4}),
}  # fmt: skip
TEXT = ("llama", "qwen3", "gemma3", "gpt2", "mixtral", "deepseek", "mamba")
BATCH, CONTEXT = 2, 14


def config_of(name: str) -> Any:
    architecture, options = MODELS[name]
    config = getattr(transformers, architecture).config_class(**options)
    config.architectures = [architecture]
    return config


def save(name: str, folder: Path) -> Path:
    """Nothing but the config."""
    config_of(name).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def real(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, MODELS[name][0])(config_of(name)).to(dtype).eval()


def sizes_of(name: str, folder: Path, *, dtype: str = "auto", **work: Any) -> Sizes:
    return measure_sizes(save(name, folder), workload=Workload(batch=BATCH, context=CONTEXT, **work), dtype=dtype)


def distinct_nbytes(tensors: Any) -> int:
    """Bytes of the storages under some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_real_model(name: str, dtype: str, tmp_path: Path) -> None:
    found = sizes_of(name, tmp_path, dtype=dtype)
    model = getattr(transformers, MODELS[name][0])._from_config(config_of(name), dtype=getattr(torch, dtype))
    tensors = [*model.parameters(), *model.buffers()]
    assert found.most.weights == distinct_nbytes(tensors)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(module.weights for module in found.modules) == found.most.weights
    assert found.dtype == dtype
    assert found.notes == ()


@pytest.mark.parametrize("name", TEXT)
def test_kv_is_what_generate_leaves(name: str, tmp_path: Path) -> None:
    found = sizes_of(name, tmp_path)
    model = real(name)
    ids = torch.randint(3, VOCAB, (BATCH, CONTEXT - 4))
    # The last of five tokens is not fed: the cache holds one less than there are.
    result = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = result.past_key_values if "past_key_values" in result else result.cache_params
    assert found.most.kv == distinct_nbytes(tensors_in(cache))
    assert found.most.kv > 0


def test_kv_of_encoder_and_decoder(tmp_path: Path) -> None:
    found = sizes_of("t5", tmp_path)
    ids = torch.randint(3, VOCAB, (BATCH, CONTEXT))
    result = real("t5").generate(ids, max_new_tokens=CONTEXT, do_sample=False, return_dict_in_generate=True)
    assert found.most.kv == distinct_nbytes(tensors_in(result.past_key_values))
    layers, width = 2, 32
    assert found.most.kv == BATCH * 4 * layers * 2 * width * (CONTEXT + CONTEXT)
    assert sizes_of("whisper", tmp_path / "w").most.kv == BATCH * 4 * layers * 2 * width * (CONTEXT + 16)


def test_a_sliding_window_bounds_the_cache(tmp_path: Path) -> None:
    config = config_of("gemma3")
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config.save_pretrained(tmp_path)
    short, long = (measure_sizes(tmp_path, workload=Workload(context=context)).most.kv for context in (20, 60))
    assert long - short == 40 * 2 * 2 * 8 * 4  # of one layer only: keys and values, two heads of eight


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.zeros(BATCH, dtype=torch.long)}
    ids = torch.randint(3, VOCAB, (BATCH, CONTEXT))
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 8, 32), "labels": ids}
    return {"input_ids": ids, "labels": ids.clone()}


def saved_nbytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """What autograd saves in a forward, weights left out, by storage."""
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in standing:
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()
        loss = model(**inputs).loss
    total = distinct_nbytes(kept)
    loss.backward()
    return total


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mamba"])
def test_activations_are_what_autograd_saves(name: str, tmp_path: Path) -> None:
    found = sizes_of(name, tmp_path, train="adamw")
    expected = saved_nbytes(real(name), inputs_of(name))
    # Held beside it: ids, labels, the loss. Real experts save some indices more.
    assert found.most.activations == pytest.approx(expected, rel=0.01, abs=1024)
    assert sum(module.activations for module in found.modules) <= found.most.activations


def test_adamw_takes_gradients_and_states_of_every_weight(tmp_path: Path) -> None:
    found = sizes_of("llama", tmp_path, train="adamw", dtype="bfloat16")
    model = real("llama", torch.bfloat16)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert found.trainable == found.parameters == elements
    assert found.most.gradients == 2 * elements
    assert found.most.optimizer == 12 * elements == optimizer_nbytes(elements, 2)
    assert found.checkpointed is not None
    assert found.peak.total >= found.most.weights + found.most.optimizer + found.most.gradients
    assert found.peak.total <= found.most.total


def test_lora_trains_adapters_only(tmp_path: Path) -> None:
    found = sizes_of("llama", tmp_path, train="lora", rank=4)
    whole = sizes_of("llama", tmp_path / "whole")
    per_layer = sum(4 * (i + o) for i, o in ((32, 32), (32, 16), (32, 16), (32, 32), (32, 80), (32, 80), (80, 32)))
    assert found.trainable == 3 * per_layer
    assert found.parameters == whole.parameters
    assert found.most.weights == whole.most.weights + 4 * found.trainable
    assert found.most.gradients == 4 * found.trainable
    assert found.most.optimizer == 8 * found.trainable


def test_checkpointing_keeps_less(tmp_path: Path) -> None:
    config = config_of("llama")
    config.num_hidden_layers = 8
    config.save_pretrained(tmp_path)
    found = measure_sizes(tmp_path, workload=Workload(train="lora", batch=8, context=64))
    assert found.checkpointed is not None
    assert found.checkpointed.activations < found.peak.activations / 2
    assert found.checkpointed.total < found.peak.total


def test_inference_peaks_above_what_it_ends_with(tmp_path: Path) -> None:
    found = sizes_of("llama", tmp_path)
    assert found.peak.total >= found.most.weights + found.most.kv
    assert found.peak.gradients == found.peak.optimizer == found.peak.activations == 0
    assert found.workload.context == CONTEXT


def test_the_default_context_is_what_the_model_has(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    assert measure_sizes(folder, workload=Workload()).workload.context == 64
    with pytest.raises(UsageError, match=r"--context 65: LlamaForCausalLM has 64 positions .*give at most 64"):
        measure_sizes(folder, workload=Workload(context=65))


def test_a_model_that_loops_over_its_tokens_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("mamba", tmp_path)
    work = Workload(train="adamw", batch=2, context=60)
    exact = measure_sizes(folder, workload=work)
    assert exact.notes == ()
    monkeypatch.setattr("penstock.runtime.rehearsal.MOST_PER_LAYER", 400)
    guessed = measure_sizes(folder, workload=work)
    assert "extrapolated" in guessed.notes[0]
    assert guessed.most.activations == pytest.approx(exact.most.activations, rel=0.05)
    assert guessed.peak.total == pytest.approx(exact.peak.total, rel=0.1)


def test_what_cannot_be_rehearsed_still_has_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
        if input_ids.sum() > 3:
            return None
        raise AssertionError("there are no values")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    found = sizes_of("llama", tmp_path, train="adamw")
    assert found.most.weights > 0
    assert found.most.activations == 0
    assert "asks for values" in found.notes[0]
    assert found.checkpointed is None


def test_configs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        measure_sizes(tmp_path, workload=Workload())
    config = config_of("llama")
    config.num_hidden_layers = 10**6
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=1000000, which no model has"):
        measure_sizes(tmp_path, workload=Workload())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -4}')
    with pytest.raises(CheckpointError):
        measure_sizes(tmp_path, workload=Workload())
    with pytest.raises(UsageError, match="int3"):
        measure_sizes(tmp_path, workload=Workload(), dtype="int3")


def test_the_copies_of_the_head_that_a_cpu_makes_are_counted(tmp_path: Path) -> None:
    config = config_of("llama")
    config.vocab_size = 4096
    config.save_pretrained(tmp_path)
    work = Workload(batch=3, context=8)
    host, device = (measure_sizes(tmp_path, workload=work, dtype="bfloat16", on_cpu=on) for on in (True, False))
    head = 4096 * 32 * 2
    assert 3 * head <= host.peak.workspace < 3.5 * head
    assert device.peak.workspace < head


def test_units_are_layers_and_what_has_none(tmp_path: Path) -> None:
    paths = [path for path, _ in units(real("llama"))]
    assert paths == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb",
        "lm_head",
    ]  # fmt: skip
    assert [path for path, _ in units(nn.Linear(2, 2))] == [""]


def test_bytes_add_up() -> None:
    assert (Bytes(weights=1, kv=2) + Bytes(kv=3, workspace=4)).total == 10
