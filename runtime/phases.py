"""Which parts of a model run once per answer, and not once per token."""

from __future__ import annotations

import re
from typing import Any, Final

from torch import nn

ONCE: Final = 1 / 32
"""Sweeps per token of what runs once per answer: answers are tens of tokens long, or longer."""

_CROSS_ATTENTION: Final = re.compile(r"enc(oder)?_?dec\w*att|encoder_?att|cross_?att", re.IGNORECASE)
_OF_THE_ENCODER: Final = re.compile(r"(k|v|kv|key|value)(_?proj(ection)?)?", re.IGNORECASE)


def once_per_answer(module: nn.Module) -> frozenset[str]:
    """Paths of the modules that `generate` runs once, before or with the first token.

    These are the encoders of text, images and sound: the transformers models inside the model that neither are its
    decoder nor contain it nor lie in it; and what the decoder's cross-attention makes of the encoder's output, the keys
    and values, which `generate` keeps. Those are known by their names in transformers' models. A wrong guess costs
    reads until the order has repeated (see scheduler/exchange.py), never correctness.

    Empty for models that do not generate, and for modules that are not transformers models at all.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        return frozenset()
    whole: Any = module
    decoder = whole.get_decoder()
    if decoder is None or decoder is module:
        return frozenset()
    inside = {id(child) for child in decoder.modules()}
    keeps_cross_attention = bool(whole.config.is_encoder_decoder)
    found: set[str] = set()
    for path, child in module.named_modules():
        if id(child) in inside:
            if keeps_cross_attention and _of_the_encoder(path):
                found.add(path)
        elif isinstance(child, PreTrainedModel) and not any(c is decoder for c in child.modules()):
            found.update(f"{path}.{below}" if below else path for below, _ in child.named_modules())
    return frozenset(found)


def _of_the_encoder(path: str) -> bool:
    """Whether a module of a decoder projects the encoder's output to keys or values."""
    parts = path.rsplit(".", 2)
    return len(parts) == 3 and bool(_CROSS_ATTENTION.search(parts[1]) and _OF_THE_ENCODER.fullmatch(parts[2]))
