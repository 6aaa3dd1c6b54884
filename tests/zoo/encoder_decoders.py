"""Models with an encoder and a decoder, each with an order of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .decoders import VOCAB, greedy, logits, prompt, token_ids
from .entry import Entry

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2}


def _t5(**changes: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        d_ff=192,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        **{**SPECIAL, "decoder_start_token_id": 0},
        **changes,
    )
    return transformers.T5ForConditionalGeneration(config)


def _t5_gated() -> nn.Module:
    return _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        max_position_embeddings=128,
        d_model=64,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        forced_eos_token_id=None,
        **SPECIAL,
    )
    return transformers.BartForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_source_positions=32,
        max_target_positions=64,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **SPECIAL,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _sound() -> dict[str, Tensor]:
    # Whisper takes exactly two frames for each source position.
    return {"input_features": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))}


def _transcribe(model: Any, inputs: Any) -> dict[str, Tensor]:
    """Greedy tokens. Whisper's own generate has no use for the options of the others."""
    return {"tokens": model.generate(**inputs, max_new_tokens=5, do_sample=False)}


def _teach(model: Any, inputs: Any) -> dict[str, Tensor]:
    """One forward through encoder and decoder, with given decoder ids."""
    return logits(model, {**inputs, "decoder_input_ids": token_ids(seed=5, length=6)})


ENCODER_DECODERS = (
    Entry(name="t5", make=_t5, inputs=prompt, forward=_teach, generate=greedy),
    Entry(name="t5-gated-bf16", make=_t5_gated, inputs=prompt, forward=_teach, generate=greedy, dtype=torch.bfloat16),
    Entry(name="bart", make=_bart, inputs=prompt, forward=_teach, generate=greedy),
    Entry(name="whisper", make=_whisper, inputs=_sound, forward=_teach, generate=_transcribe),
)
