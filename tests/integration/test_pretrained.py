"""Skeletons against from_pretrained: every weight, buffer, tie and setting, bit for bit."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from penstock.memory.errors import CheckpointError, UsageError
from penstock.memory.layout import TensorSource
from penstock.runtime.conversion import Converted, Source
from penstock.runtime.dtypes import torch_dtype
from penstock.runtime.pretrained import skeleton

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}


def llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))


def gemma3() -> tf.PreTrainedModel:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=8))


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def opt() -> tf.PreTrainedModel:
    config = tf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
    return tf.OPTForCausalLM(config)


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4))


def qwen3_moe() -> tf.PreTrainedModel:
    config = tf.Qwen3MoeConfig(**DECODER, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    return tf.Qwen3MoeForCausalLM(config)


def t5() -> tf.PreTrainedModel:
    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return tf.T5ForConditionalGeneration(config)


def bart() -> tf.PreTrainedModel:
    sides = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=96, d_model=32, max_position_embeddings=32, **sides)
    )


def whisper() -> tf.PreTrainedModel:
    sides = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = tf.WhisperConfig(
        vocab_size=96,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        **sides,
    )
    return tf.WhisperForConditionalGeneration(config)


def vit() -> tf.PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


def clip() -> tf.PreTrainedModel:
    text = {**TOWER, "vocab_size": 96, "max_position_embeddings": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def mamba() -> tf.PreTrainedModel:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2))


def batch_norm() -> tf.PreTrainedModel:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return tf.ResNetForImageClassification(config)


FAMILIES = [llama, gemma3, gpt2, opt, mixtral, qwen3_moe, t5, bart, whisper, vit, clip, mamba, batch_norm]


def save(make: Callable[[], tf.PreTrainedModel], folder: Path, dtype: torch.dtype, shard: str = "1GB") -> None:
    torch.manual_seed(0)
    make().to(dtype).save_pretrained(folder, max_shard_size=shard)


def read(source: TensorSource) -> torch.Tensor:
    data = bytearray()
    for span in source.spans:
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            data += file.read(span.nbytes)
    return torch.frombuffer(data, dtype=torch_dtype(source.dtype)).reshape(source.shape)


def materialise(name: str, source: Source, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(source, Converted):
        value = source.convert({key: read(each) for key, each in source.sources.items()})
        assert value.keys() == {name}
        assert value[name].dtype == dtype
        return value[name]
    return read(source).to(dtype)


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def check(folder: Path, model_class: type[tf.PreTrainedModel], **options: object) -> None:
    built = skeleton(folder, **options)
    expected = model_class.from_pretrained(folder, dtype=options.get("dtype", "auto"))
    assert type(built.model) is type(expected)
    params = dict(built.model.named_parameters())
    buffers = dict(built.model.named_buffers())
    assert params.keys() == dict(expected.named_parameters()).keys()
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(tensor.is_meta for tensor in params.values())
    persistent = built.model.state_dict().keys()
    assert built.sources.keys() == params.keys() | (buffers.keys() & persistent)
    for name, wanted in (*expected.named_parameters(), *expected.named_buffers()):
        if name in built.sources:
            value = materialise(name, built.sources[name], built.dtypes[name])
            assert (params | buffers)[name].dtype == built.dtypes[name]
        else:
            value = buffers[name]
            assert value.device.type == "cpu"
        assert equal_bits(value, wanted), name
        assert (params | buffers)[name].requires_grad == wanted.requires_grad
    everything = dict(expected.named_parameters(remove_duplicate=False))
    for name, tensor in built.model.named_parameters(remove_duplicate=False):
        first = next(key for key, value in everything.items() if value is everything[name])
        assert tensor is params[first], f"{name} is tied as from_pretrained ties it"
    assert not any(module.training for module in built.model.modules())
    assert built.config._attn_implementation == expected.config._attn_implementation
    assert built.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        assert built.model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("make", FAMILIES)
def test_every_family_agrees_with_from_pretrained(make: Callable[[], tf.PreTrainedModel], tmp_path: Path) -> None:
    save(make, tmp_path, torch.bfloat16, shard="4KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    check(tmp_path, type(make()))


@pytest.mark.parametrize("make", [llama, mixtral, t5, clip])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_single_file_cast_on_the_way(
    make: Callable[[], tf.PreTrainedModel], dtype: torch.dtype, tmp_path: Path
) -> None:
    save(make, tmp_path, torch.float32)
    assert (tmp_path / "model.safetensors").exists()
    check(tmp_path, type(make()), dtype=dtype)


def test_modules_kept_in_fp32_are_kept(tmp_path: Path) -> None:
    save(t5, tmp_path, torch.float32)
    dtypes = skeleton(tmp_path, dtype="fp16").dtypes
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32
    assert dtypes["shared.weight"] == torch.float16


def test_experts_are_runs_of_the_original_files(tmp_path: Path) -> None:
    save(mixtral, tmp_path, torch.bfloat16)
    source = skeleton(tmp_path).sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(source, TensorSource)
    assert source.shape == (4, 96, 32)
    assert 1 < len(source.spans) <= 8


def test_transposed_experts_are_computed_once(tmp_path: Path) -> None:
    def qwen3_vl_moe() -> tf.PreTrainedModel:
        text = {**DECODER, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
        config = tf.Qwen3VLMoeConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**vision, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        )
        return tf.Qwen3VLMoeForConditionalGeneration(config)

    # GIVEN experts stored as the published checkpoints store them
    save(qwen3_vl_moe, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = {name: t.mT.contiguous() if ".mlp.experts." in name else t for name, t in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, tf.Qwen3VLMoeForConditionalGeneration)
    check(tmp_path, tf.Qwen3VLMoeForConditionalGeneration, dtype=torch.bfloat16)
    source = skeleton(tmp_path).sources["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(source, Converted)
    assert len(source.sources) == 1


def test_ties_with_both_sides_in_the_checkpoint(tmp_path: Path) -> None:
    save(gemma3, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, tf.Gemma3ForCausalLM)
    tied = skeleton(tmp_path).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, tf.Gemma3ForCausalLM)
    assert "lm_head.weight" in skeleton(tmp_path).sources


def test_base_model_prefix_is_added(tmp_path: Path) -> None:
    save(gpt2, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, tf.GPT2LMHeadModel)


def test_a_cache_of_links_works(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save(llama, tmp_path / "saved", torch.bfloat16, shard="4KB")
    for i, name in enumerate(sorted(os.listdir(tmp_path / "saved"))):
        shutil.move(tmp_path / "saved" / name, blobs / f"{i:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{i:064x}")
    check(snapshot, tf.LlamaForCausalLM)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, *words: str, **options: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        skeleton(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(llama, tmp_path, torch.bfloat16)
    return tmp_path


def test_a_missing_tensor_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    refused(saved, "model.layers.1.mlp.up_proj.weight", "[48, 32]", "missing")


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    save(mixtral, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "experts.3" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "experts")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ("[96, 32]", "[96, 64]")),
        ({"intermediate_size": 2**45}, ("mlp", "48")),
        ({"vocab_size": 2**70}, ("config.json",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers=1000000000",)),
        ({"hidden_size": "x"}, ("config.json",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq", "quantised")),
        ({"attn_implementation": "someone/kernel"}, ("someone/kernel",)),
        ({"model_type": "nothing-known"}, ("config.json",)),
        ({"dtype": "float99"}, ("config.json",)),
    ],
)
def test_configs_that_disagree_or_ask_too_much(saved: Path, changes: dict[str, object], words: tuple[str, ...]) -> None:
    edit_config(saved, **changes)
    refused(saved, *words)


def test_no_code_of_a_checkpoint_runs(saved: Path) -> None:
    (saved / "code.py").write_text(f"open({str(saved / 'ran')!r}, 'w')")
    edit_config(saved, model_type="own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    refused(saved, "trust_remote_code=True")
    edit_config(saved, model_type="llama")
    skeleton(saved)
    assert not (saved / "ran").exists()


def test_buffers_of_absurd_size_are_refused(tmp_path: Path) -> None:
    def xglm() -> tf.PreTrainedModel:
        config = tf.XGLMConfig(vocab_size=96, max_position_embeddings=32, d_model=32, ffn_dim=48, num_layers=2)
        return tf.XGLMForCausalLM(config)

    save(xglm, tmp_path, torch.bfloat16)
    check(tmp_path, tf.XGLMForCausalLM)
    edit_config(tmp_path, max_position_embeddings=2**40)
    refused(tmp_path, "buffers")


def test_no_such_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path / "none", "no such folder")
    refused("nobody/nothing", "no such folder", "HF_HUB_OFFLINE")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "not a folder")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pytorch_model.bin", "save_pretrained")


def test_no_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    refused(saved, "config.json")


def test_unknown_dtype(saved: Path) -> None:
    with pytest.raises(UsageError, match="bf17"):
        skeleton(saved, dtype="bf17")


def test_unused_tensors_are_ignored(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["stranger"] = torch.zeros(3)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    check(saved, tf.LlamaForCausalLM)


def test_memory_does_not_grow_with_the_weights(saved: Path) -> None:
    # GIVEN a sparse checkpoint of 8 GiB, its header written by hand
    edit_config(saved, vocab_size=2**26)
    header = {}
    at = 0
    for name, tensor in load_file(saved / "model.safetensors").items():
        shape = [2**26, 32] if tensor.shape[0] == 96 else list(tensor.shape)
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    (saved / "model.safetensors").unlink()
    with open(saved / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # WHEN its skeleton is built
    built = skeleton(saved)
    # THEN the process has not grown by more than a thousandth of it
    assert built.checkpoint.nbytes > 8 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 2**10
