"""Find out how a model attends without calling it: its class, with tensors that have shapes and no numbers.

A cache that is filled from a store is not empty when the model first sees it, so what a first call shows (see `layer`)
would come too late: all layers would be put together for it, beyond the budget. The same code, run on torch's meta
device, shows the same: it costs no weights and no products.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .interface import switch
from .layer import TieredLayer
from .tiers import KvTiers

logger = logging.getLogger(__name__)

TOKENS: Final = 2
"""Of the call: one alone would take the branches of decoding."""


def probe(model: Any) -> dict[int, bool]:
    """By number of each layer that can be kept in tiers, whether it attends to just what its cache gives back.

    Args:
        model: A decoder of transformers, on any device; it is not called, and its weights are not looked at.

    Returns:
        What a first call would show; nothing where the class cannot be made or called without weights, which its first
        call tells then.
    """
    found: dict[int, bool] = {}
    try:
        with torch.no_grad(), torch.device("meta"):
            _call(type(model), copy.deepcopy(model.config), found)
    except Exception as error:  # a model's own code, without numbers: whatever it raises, its first call tells
        logger.debug("%s cannot be called without weights: %s", type(model).__name__, error)
        return {}
    return found


def _call(kind: Any, config: Any, found: dict[int, bool]) -> None:
    own = config.get_text_config(decoder=True)
    for one in (config, own):
        name = getattr(one, "_attn_implementation", None)
        one._attn_implementation_internal = getattr(name, "original", name)
    twin = kind(config).eval()
    cache = DynamicCache(config=twin.config)
    if not switch(twin.config.get_text_config(decoder=True)):
        return
    watching = list(_watch(cache, found))
    twin(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)
    for layer in watching:
        layer.learn()


def _watch(cache: DynamicCache, found: dict[int, bool]) -> Iterator[TieredLayer]:
    """Put layers that only watch in the places of those that a cache in tiers would have."""
    plain = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    for number, index in enumerate(plain):
        layer = TieredLayer(cast("KvTiers", _Nothing()), number, known=False, learned=found.__setitem__)
        cache.layers[index] = layer
        yield layer


class _Nothing:
    """Keeps nothing: what `TieredLayer` asks of `KvTiers` in a first call."""

    def store(self, number: int) -> None:
        """None: the layer is empty."""

    def require_in_step(self, number: int, new: int) -> None:
        """It always is."""

    def in_whole(self) -> AbstractContextManager[None]:
        """Nothing can be interrupted."""
        return nullcontext()

    def append(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """They have no numbers."""
