"""The shape of a model from its config.json, whatever the names of its keys, or from what a publication says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..memory.errors import CheckpointError, UsageError
from .hardware import Dtype
from .modelshape import ITEMSIZE, Layer, Matrix, ModelShape, Sizes, decoder

Config = Mapping[str, Any]

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "hidden"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_heads"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "ffn"),
    "vocab": ("vocab_size", "padded_vocab_size", "vocab"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "experts_per_token"),
}

_NARROW: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "int8": "int8"}


def read_config(path: str | Path) -> ModelShape:
    """The shape of the model whose config.json `path` is, or is the folder of.

    Raises:
        CheckpointError: there is no such file, it is not JSON, or figures in it cannot be.
        UsageError: the architecture is unknown, and keys are missing that would be needed to estimate it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}): give a config.json, or its folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds a {type(config).__name__}: a config.json is an object")
    text = config.get("text_config")
    return shape_of({**config, **text} if isinstance(text, dict) else config, name=file.parent.name or file.stem)


def shape_of(config: Config, *, name: str = "model") -> ModelShape:
    """The shape that a config describes.

    Raises:
        CheckpointError: figures in it cannot be.
        UsageError: keys are missing.
    """
    family = str(config.get("model_type", ""))
    builder = _FAMILIES.get(family)
    if builder is not None:
        return builder(config, name)
    found = _llama_like(config, name)
    called = f"architecture {family!r} is not known" if family else "the config names no architecture"
    note = f"{called}: estimated from its sizes, as a Llama-like decoder"
    return replace(found, notes=(*found.notes, note))


def published_shape(model: Config) -> ModelShape:
    """The shape of a model from a publication's figures: name, layers, hidden, heads, ffn, vocab, precision.

    Raises:
        UsageError: keys are missing.
    """
    name = str(model.get("name", "model"))
    family = next((family for prefix, family in _PUBLISHED if name.lower().startswith(prefix)), "gpt2")
    config: dict[str, Any] = {"vocab": _VOCAB.get(family, 50257), **model, "model_type": family}
    config["torch_dtype"] = str(model.get("precision", "fp16")).split()[0]
    return shape_of(config, name=name)


_PUBLISHED = (
    ("opt", "opt"),
    ("bloom", "bloom"),
    ("llama", "llama"),
    ("mixtral", "mixtral"),
    ("mistral", "mistral"),
    ("qwen", "qwen2"),
    ("deepseek", "deepseek_v3"),
)
_VOCAB = {"opt": 50272, "bloom": 250880, "llama": 32000, "mixtral": 32000}
"""Of the released models, where a publication does not say it."""


def _find(config: Config, key: str, default: int | None = None) -> int:
    value = next((config[each] for each in _SPELLINGS[key] if config.get(each) is not None), default)
    if value is None:
        raise UsageError(f"the config has no {key}: one of {', '.join(_SPELLINGS[key])} is needed")
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if "experts" in key else 1):
        raise CheckpointError(f"the config says {key} = {value!r}: a whole number of 1 or more is needed")
    return value


def _sizes(config: Config, *, gated: bool, **more: Any) -> Sizes:
    missing = [key for key in ("hidden", "layers", "heads", "vocab") if not _has(config, key)]
    if gated and not _has(config, "ffn"):
        missing.append("ffn")
    if missing:
        wanted = "; ".join(f"{key} (as {' or '.join(_SPELLINGS[key][:3])})" for key in missing)
        raise UsageError(f"the config lacks {wanted}: without them nothing can be estimated")
    hidden, heads = _find(config, "hidden"), _find(config, "heads")
    if hidden % heads and "head_dim" not in config:
        raise CheckpointError(f"the config says hidden = {hidden} and heads = {heads}: one must divide the other")
    fields: dict[str, Any] = {
        "hidden": hidden,
        "layers": _find(config, "layers"),
        "heads": heads,
        "kv_heads": _find(config, "kv_heads", heads),
        "head_dim": _optional(config, "head_dim", hidden // heads),
        "ffn": _find(config, "ffn", 4 * hidden),
        "vocab": _find(config, "vocab"),
        "gated": gated,
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    if fields["heads"] % fields["kv_heads"]:
        raise CheckpointError(
            f"the config says heads = {fields['heads']} and kv_heads = {fields['kv_heads']}: one must divide the other"
        )
    return Sizes(**{**fields, **more})


def _optional(config: Config, key: str, default: int) -> int:
    """A whole number, or the default where there is none."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"the config says {key} = {value!r}: a whole number is needed")
    return value


def _experts(config: Config) -> tuple[int, int]:
    """How many there are, and how many each token uses."""
    experts, used = _find(config, "experts"), _find(config, "experts_per_token", 2)
    if not 1 <= used <= experts:
        raise CheckpointError(
            f"the config says that a token uses {used} of {experts} experts: 1 to {experts} are possible"
        )
    return experts, used


def _has(config: Config, key: str) -> bool:
    return any(config.get(each) is not None for each in _SPELLINGS[key])


def _dtype(config: Config) -> Dtype:
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = _NARROW.get(said, said)
    return dtype if dtype in ITEMSIZE else "bfloat16"


def _opt(config: Config, name: str) -> ModelShape:
    sizes = _sizes(
        config,
        gated=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        attention_bias=True,
        output_bias=True,
        ffn_bias=True,
        norm_bias=True,
        positions=_optional(config, "max_position_embeddings", 2048) + 2,
    )
    return decoder(sizes, name=name, family="opt", dtype=_dtype(config))


def _gpt2(config: Config, name: str) -> ModelShape:
    sizes = _sizes(
        config,
        gated=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        fused_qkv=True,
        attention_bias=True,
        output_bias=True,
        ffn_bias=True,
        norm_bias=True,
        positions=_optional(config, "n_positions", _optional(config, "max_position_embeddings", 1024)),
    )
    return decoder(sizes, name=name, family="gpt2", dtype=_dtype(config))


def _neox(config: Config, name: str) -> ModelShape:
    bias = bool(config.get("attention_bias", True))
    sizes = _sizes(
        config, gated=False, fused_qkv=True, attention_bias=bias, output_bias=bias, ffn_bias=True, norm_bias=True
    )
    return decoder(sizes, name=name, family="gpt_neox", dtype=_dtype(config))


def _bloom(config: Config, name: str) -> ModelShape:
    sizes = _sizes(
        config,
        gated=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        fused_qkv=True,
        attention_bias=True,
        output_bias=True,
        ffn_bias=True,
        norm_bias=True,
        embedding_norm=True,
    )
    return decoder(sizes, name=name, family="bloom", dtype=_dtype(config))


def _llama_like(config: Config, name: str) -> ModelShape:
    bias = bool(config.get("attention_bias", False))
    sizes = _sizes(
        config, gated=True, attention_bias=bias, output_bias=bias, ffn_bias=bool(config.get("mlp_bias", False))
    )
    if _has(config, "experts") and _find(config, "experts") > 0:
        return _with_experts(config, name, sizes, family=str(config.get("model_type", "")))
    return decoder(sizes, name=name, family=str(config.get("model_type", "")), dtype=_dtype(config))


def _qwen2(config: Config, name: str) -> ModelShape:
    return decoder(_sizes(config, gated=True, attention_bias=True), name=name, family="qwen2", dtype=_dtype(config))


def _qwen3(config: Config, name: str) -> ModelShape:
    bias = bool(config.get("attention_bias", False))
    sizes = _sizes({"head_dim": 128, **config}, gated=True, attention_bias=bias, output_bias=bias, head_norms=True)
    return decoder(sizes, name=name, family="qwen3", dtype=_dtype(config))


def _mixtral(config: Config, name: str) -> ModelShape:
    config = {"num_local_experts": 8, "num_experts_per_tok": 2, **config}
    return _with_experts(config, name, _sizes(config, gated=True), family="mixtral")


def _qwen2_moe(config: Config, name: str) -> ModelShape:
    sizes = _sizes(config, gated=True, attention_bias=bool(config.get("qkv_bias", True)))
    return _with_experts(config, name, sizes, family="qwen2_moe")


def _qwen3_moe(config: Config, name: str) -> ModelShape:
    bias = bool(config.get("attention_bias", False))
    sizes = _sizes(config, gated=True, attention_bias=bias, output_bias=bias, head_norms=True)
    return _with_experts(config, name, sizes, family="qwen3_moe")


def _with_experts(config: Config, name: str, sizes: Sizes, *, family: str) -> ModelShape:
    experts, used = _experts(config)
    width = _optional(config, "moe_intermediate_size", sizes.ffn)
    router = Matrix(name="router", role="router", inputs=sizes.hidden, outputs=experts)
    matrices = [*sizes.attention, router, *sizes.feed_forward(width, role="expert", copies=experts, used=used)]
    widest = used * width
    if shared := _optional(config, "shared_expert_intermediate_size", 0):
        matrices += sizes.feed_forward(shared)
        matrices.append(Matrix(name="shared_gate", role="router", inputs=sizes.hidden, outputs=1))
        widest += shared
    sparse = Layer(count=sizes.layers, matrices=tuple(matrices), vectors=sizes.vectors)
    return decoder(sizes, name=name, family=family, dtype=_dtype(config), layers=(sparse,), ffn=widest)


def _deepseek(config: Config, name: str) -> ModelShape:
    sizes = _sizes(config, gated=True, head_dim=_whole(config, "v_head_dim"))
    latent, rotary = _whole(config, "kv_lora_rank"), _whole(config, "qk_rope_head_dim")
    plain, rank = _whole(config, "qk_nope_head_dim"), _optional(config, "q_lora_rank", 0)
    queries = sizes.heads * (plain + rotary)
    widths = [("q_a", sizes.hidden, rank), ("q_b", rank, queries)] if rank else [("q", sizes.hidden, queries)]
    widths += [
        ("kv_a", sizes.hidden, latent + rotary),
        ("kv_b", latent, sizes.heads * (plain + sizes.head_dim)),
        ("o", sizes.heads * sizes.head_dim, sizes.hidden),
    ]
    attention = tuple(Matrix(name=what, role="attention", inputs=a, outputs=b) for what, a, b in widths)
    experts, used = _experts(config)
    width = _whole(config, "moe_intermediate_size")
    shared = _optional(config, "n_shared_experts", 0) * width
    router = Matrix(name="router", role="router", inputs=sizes.hidden, outputs=experts)
    sparse = (
        *attention,
        router,
        *sizes.feed_forward(width, role="expert", copies=experts, used=used),
        *(sizes.feed_forward(shared) if shared else ()),
    )
    vectors = sizes.vectors + latent + rank
    dense = min(_optional(config, "first_k_dense_replace", 0), sizes.layers)
    layers = (
        Layer(count=dense, matrices=(*attention, *sizes.feed_forward(sizes.ffn)), vectors=vectors),
        Layer(count=sizes.layers - dense, matrices=sparse, vectors=vectors),
    )
    return decoder(
        sizes,
        name=name,
        family=str(config.get("model_type", "deepseek_v3")),
        dtype=_dtype(config),
        layers=tuple(layer for layer in layers if layer.count),
        kv_elements=latent + rotary,
        ffn=max(used * width + shared, sizes.ffn if dense else 0),
        notes=("its cache is counted as the latent one, which transformers' own cache unpacks",),
    )


def _whole(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"the config has {key} = {value!r}: this architecture needs a whole number there")
    return value


_FAMILIES: dict[str, Callable[[Config, str], ModelShape]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "bloom": _bloom,
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
