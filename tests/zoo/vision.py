"""Models that look at pictures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .decoders import VOCAB, prompt
from .entry import Entry, Inputs, Outputs

TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 8}


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, **PICTURE, num_labels=10))


def _clip() -> nn.Module:
    text = {**TOWER, "vocab_size": VOCAB, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**TOWER, **PICTURE}, projection_dim=32)
    return transformers.CLIPModel(config)


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))}


def _classify(model: Any, inputs: Inputs) -> Outputs:
    return {"logits": model(**inputs).logits}


def _classify_bf16(model: Any, inputs: Inputs) -> Outputs:
    return _classify(model, {key: value.bfloat16() for key, value in inputs.items()})


def _compare(model: Any, inputs: Inputs) -> Outputs:
    out = model(**inputs)
    return {"logits": out.logits_per_image, "text": out.text_embeds, "image": out.image_embeds}


VISION = (
    Entry(name="vit", make=_vit, inputs=_pixels, forward=_classify),
    Entry(name="vit-bf16", make=_vit, inputs=_pixels, forward=_classify_bf16, dtype=torch.bfloat16),
    Entry(name="clip", make=_clip, inputs=lambda: {**prompt(), **_pixels()}, forward=_compare),
)
