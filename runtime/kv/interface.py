"""Our attention, among transformers' own: it computes what is in blocks, and passes on everything else unchanged.

A config says by name which attention its model computes with. A cache puts our name in the place of the one that was
there, and there is one of our names for each of those that can be replaced: what is not ours (sliding windows,
encoders, cross-attention, other caches) goes to that one, with a mask of its kind.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ...memory.errors import UsageError
from .layer import updated_layer

if TYPE_CHECKING:
    from .cache import TieredCache

Result = tuple[torch.Tensor, torch.Tensor | None]


class _Name(str):
    """Our name for an attention, which says that it is the one that it replaces, too: files of models compare names,
    and what is not ours must take the branch that it took before. As a key it is itself only."""

    original: str

    @classmethod
    def of(cls, original: str, name: str) -> _Name:
        """One that stands for another."""
        made = cls(name)
        made.original = original
        return made

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.original

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


NAMES: Final = {"sdpa": _Name.of("sdpa", "penstock_tiered"), "eager": _Name.of("eager", "penstock_tiered_plain")}
"""Ours, for each of transformers' that can be replaced. Its own checks look for the names of those in these."""
_HARMLESS: Final = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "logits_to_keep"),
        *("past_key_values", "past_key_value", "num_items_in_batch", "is_causal", "cu_seq_lens_q", "cu_seq_lens_k"),
        *(
            "max_length_q",
            "max_length_k",
            "output_router_logits",
            "position_embeddings",
            "head_mask",
            "layer_head_mask",
        ),
    }
)
"""What is passed to attention and does not change it, or must be empty (see `_strange`)."""


class _Masking(threading.local):
    """The cache whose sizes were asked for last in a thread: the next mask is for it."""

    cache: weakref.ref[TieredCache] | None = None


_masking = _Masking()


def masks_for(cache: TieredCache) -> None:
    """The next mask that this thread makes is for a layer of this cache that is kept in tiers."""
    _masking.cache = weakref.ref(cache)


def switch(config: Any) -> bool:
    """Have models with this config compute with our attention; whether that can be.

    Args:
        config: Of the decoder, the very object that its modules have.
    """
    current = getattr(config, "_attn_implementation", None)
    if isinstance(current, _Name):
        return True
    if current not in NAMES:
        return False
    _register(current)
    config._attn_implementation_internal = NAMES[current]
    return True


@functools.cache
def _register(original: str) -> None:
    AttentionInterface.register(NAMES[original], functools.partial(_attention, original))
    masking_utils.AttentionMaskInterface.register(NAMES[original], functools.partial(_mask, original))


def _attention(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Result:
    """See transformers' `AttentionInterface`."""
    layer = updated_layer()
    if layer is not None and layer.claims(
        key, value, config=getattr(module, "config", None), strange=_strange(kwargs, dropout, attention_mask)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = layer.attend(
            query, scale=scale, mask=attention_mask, cap=kwargs.get("softcap"), sinks=kwargs.get("s_aux")
        )
        return out, None
    function = _original(original, module)
    result: Result = function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return result


def _strange(kwargs: dict[str, Any], dropout: float, mask: torch.Tensor | None) -> str:
    """What our attention does not know how to do; empty where it knows all."""
    if dropout:
        return "attention with dropout"
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 4):
        return "a mask that is not of four dimensions"
    if kwargs.get("is_causal") is False:
        return "attention in both directions"
    if kwargs.get("output_attentions"):
        return "attention weights that are to be returned"
    for name, value in kwargs.items():
        if name in _HARMLESS or name in ("softcap", "s_aux") or value is None or value is False:
            continue
        return f"an argument of attention that is not known here, {name}"
    return ""


def _original(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """What the model would compute with. Its file may have an interface of its own, and has its own plain attention."""
    file = sys.modules[type(module).__module__]
    interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    plain: Callable[..., Any] = getattr(file, "eager_attention_forward", _no_plain_attention)
    function: Callable[..., Any] = interface.get_interface(name, plain)
    return function


def _no_plain_attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise UsageError(
        f"{type(module).__name__} computes attention in a way of its own, which cannot be found: load the model with "
        'attn_implementation="sdpa"'
    )


def _mask(
    original: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """See transformers' `AttentionMaskInterface`: none where all see what is before them, whatever their number."""
    asked, _masking.cache = _masking.cache, None
    cache = None if asked is None else asked()
    if cache is not None:
        agrees = cache.hear_padding(attention_mask, batch_size, kv_length)
        if agrees and mask_function is masking_utils.causal_mask_function and cache.attends_in_blocks:
            return None
    make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[original]
    made: torch.Tensor | None = make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return made
