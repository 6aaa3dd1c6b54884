"""Which parts of a model run once per answer, and not once per token."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

ONCE: Final = 1 / 32
"""Sweeps per token of what runs once per answer: answers are tens of tokens long, or longer."""


def once_per_answer(module: nn.Module) -> frozenset[str]:
    """Paths of the modules that `generate` runs once, before the first token: encoders of text, images and sound.

    These are the transformers models inside the model that neither are its decoder nor contain it nor lie in it. Empty
    for models that do not generate, and for modules that are not transformers models at all.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        return frozenset()
    whole: Any = module
    decoder = whole.get_decoder()
    if decoder is None or decoder is module:
        return frozenset()
    inside = {id(child) for child in decoder.modules()}
    found: set[str] = set()
    for path, child in module.named_modules():
        if not isinstance(child, PreTrainedModel) or id(child) in inside or any(c is decoder for c in child.modules()):
            continue
        found.update(f"{path}.{below}" if below else path for below, _ in child.named_modules())
    return frozenset(found)
