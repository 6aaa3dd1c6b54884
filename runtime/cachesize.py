"""What a sequence keeps between tokens, from the config: keys and values of attention, of an encoder's output too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

_LATENTS_EVERYWHERE: Final = (5, 18)
"""From this transformers on, layers with an indexer keep latents too; before, they kept what is made of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Layers of a decoder that are alike."""

    elements: int
    """Of each token."""
    most_tokens: int | None = None
    """Of a sliding window; None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """Elements that one sequence keeps."""

    layers: tuple[_Layer, ...]
    source_elements: int = 0
    """Of each position of the encoder's output, over all layers: what cross-attention makes of it."""
    sources: int | None = None
    """Positions of the encoder's output, where they are always as many; None where there is one for each token."""

    @property
    def token_elements(self) -> int:
        """Of each token that the decoder has, sliding windows not considered."""
        return sum(layer.elements for layer in self.layers)

    def elements(self, *, tokens: int, sources: int) -> int:
        """Of a decoder that has so many tokens, and an encoder that was given so many."""
        own = sum(layer.elements * min(tokens, layer.most_tokens or tokens) for layer in self.layers)
        return own + self.source_elements * (sources if self.sources is None else self.sources)


def cache_size(config: Any) -> CacheSize:
    """The size of transformers' own cache for a model with this config.

    Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434) keeps a latent and a rotary key per
    token, which all heads share. States of linear attention, whose sizes configs tell in ways of their own, are counted
    as if the layer kept keys and values.
    """
    if getattr(config, "is_encoder_decoder", False):
        return _encoder_decoder(config)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    each = _per_layer(text)
    kinds = _kinds(text) or ["DynamicLayer"] * len(each)
    indexed = getattr(text, "indexer_types", None) or ["full"] * len(each)
    return CacheSize(layers=tuple(_layers(zip(kinds, each, indexed, strict=False))))


def _encoder_decoder(config: Any) -> CacheSize:
    text = config.get_text_config(decoder=True)
    count = first_of(config, ("num_decoder_layers", "decoder_layers"), 0) or _depth(text)
    elements = _plain(text)
    sources = getattr(config, "max_source_positions", None)  # sound, padded to one length
    return CacheSize(
        layers=(_Layer(elements=elements),) * count,
        source_elements=count * elements,
        sources=sources if isinstance(sources, int) else None,
    )


def _layers(layers: Iterable[tuple[str, Any, str]]) -> Iterator[_Layer]:
    for kind, config, indexer in layers:
        if kind == "DummyLayer":  # it uses those of another layer, or has none
            continue
        elements = _latent(config, kind) or _plain(config)
        if kind == "DynamicIndexedLayer" and indexer != "shared":  # else it uses the indexer of another layer
            elements += first_of(config, ("index_head_dim",), 0)
        window = None
        if "SlidingWindow" in kind:
            width = first_of(config, ("sliding_window", "attention_chunk_size"), 0)
            window = max(width - 1, 1) if width else None  # the token at work is the last of its window
        yield _Layer(elements=elements, most_tokens=window)


def _latent(config: Any, kind: str) -> int:
    """What latent attention keeps of a token in a layer; 0 where a layer has another kind of attention."""
    latent = first_of(config, ("kv_lora_rank",), 0)
    if not latent:
        return 0
    rotary = first_of(config, ("qk_rope_head_dim",), 0)
    if kind == "DynamicIndexedLayer" and _transformers_version() < _LATENTS_EVERYWHERE:
        key = first_of(config, ("qk_nope_head_dim",), 0) + rotary
        return first_of(config, ("num_attention_heads",), 1) * (key + first_of(config, ("v_head_dim",), key))
    return latent + rotary


def _plain(config: Any) -> int:
    """Keys and values of a token in a layer."""
    hidden = first_of(config, ("hidden_size", "d_model", "n_embd"), 1024)
    heads = first_of(config, ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"), 16)
    kv_heads = first_of(config, ("num_key_value_heads",), heads)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    key = first_of(config, ("head_dim", "d_kv"), max(hidden // heads, 1))
    value = first_of(config, ("v_head_dim",), key)
    return kv_heads * (key + value)


def _depth(config: Any) -> int:
    return first_of(config, ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers"), 12)


def _per_layer(config: Any) -> list[Any]:
    """The config of each layer: of some models they differ."""
    try:
        return list(config.per_layer_config)
    except AttributeError:
        return [config] * _depth(config)


def _kinds(config: Any) -> list[str]:
    """The kinds of transformers' layers of a cache; empty where it does not know the model."""
    from transformers.cache_utils import DynamicCache  # imports half of transformers

    try:
        return [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    except (AttributeError, KeyError, TypeError, ValueError):  # configs of models that bring their own code
        return []


def _transformers_version() -> tuple[int, int]:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def first_of(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of these that a config has as a number above 0."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default
