"""Keys, values and states of transformers' caches: where those of a layer are, and how they change places.

Attention is computed where its keys and values lie. A layer whose calls change processors takes them along, once per
change: prefill leaves them on the device, the first token of decoding brings them to the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch

_MODULE: Final = "transformers.cache_utils"
_MODULES: Final = frozenset({_MODULE, "penstock.runtime.reserved"})
"""Where kinds of caches are known from; not imported for this."""
_CACHES: Final = frozenset({"Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache"})
_LAYERS: Final = frozenset(
    {
        *("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"),
        *("StaticLayer", "StaticSlidingWindowLayer", "StaticIndexedLayer", "LinearAttentionLayer", "DummyLayer"),
        *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
        *("LinearAttentionAndStaticFullAttentionLayer", "LinearAttentionAndStaticSlidingWindowAttentionLayer"),
        "ReservedLayer",  # whose buffers follow: it makes others where it finds its keys and values
    }
)
"""Those that keep all they have in tensors, and dicts of tensors, among their attributes."""


def is_cache(value: object) -> bool:
    """Whether a value is a cache of transformers, of whatever kind."""
    module = sys.modules.get(_MODULE)  # not imported for this: without it there is no cache
    return module is not None and isinstance(value, module.Cache)


def can_move(cache: Any, indices: Collection[int]) -> bool:
    """Whether the entries of these layers may change places: others keep more than is known here, or move it about."""
    if _name(cache) not in _CACHES or getattr(cache, "offloading", False):
        return False
    if _name(cache) == "EncoderDecoderCache":
        return can_move(cache.self_attention_cache, indices) and can_move(cache.cross_attention_cache, indices)
    return bool(indices) and all(_name(layer) in _LAYERS for layer in _layers(cache, indices))


def move(cache: Any, indices: Collection[int], carry: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put what `carry` makes of each tensor of these layers in its place; it gives back those that stay.

    Args:
        cache: One that `can_move`.
        indices: Of the layers.
        carry: Copies a tensor to the other memory.
    """
    if _name(cache) == "EncoderDecoderCache":
        move(cache.self_attention_cache, indices, carry)
        move(cache.cross_attention_cache, indices, carry)
        return
    for layer in _layers(cache, indices):
        _move_layer(layer, carry)


def _move_layer(layer: Any, carry: Callable[[torch.Tensor], torch.Tensor]) -> None:
    there: torch.device | None = None
    for name, value in list(vars(layer).items()):
        if isinstance(value, torch.Tensor):
            moved = carry(value)
            if moved is not value:
                setattr(layer, name, moved)
                there = moved.device
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    value[key] = carry(item)
                    there = value[key].device if value[key] is not item else there
    if there is not None and getattr(layer, "device", None) is not None:
        layer.device = there  # it makes its positions there


def _layers(cache: Any, indices: Collection[int]) -> Iterator[Any]:
    """Those that are there already: a dynamic cache grows as layers use it."""
    return (cache.layers[index] for index in indices if index < len(cache.layers))


def _name(value: object) -> str:
    """The name of a class that is known here; empty for others, a subclass of a model's own among them."""
    return type(value).__name__ if type(value).__module__ in _MODULES else ""
