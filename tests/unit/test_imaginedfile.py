"""A file that is imagined lies as one that is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from penstock.memory.checkpoint import Checkpoint
from penstock.memory.layout import ITEMSIZE
from penstock.runtime.imaginedfile import imagined_file
from penstock.runtime.pretrained import outline, skeleton

SHAPE = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 257, "num_hidden_layers": 2}


def plain() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4))


def tied() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, tie_word_embeddings=True))


def shared() -> PreTrainedModel:
    """Encoder and decoder share an embedding, which the output layer is tied to."""
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=101))


def with_buffers() -> PreTrainedModel:
    """Persistent buffers in between, of wider elements than weights."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def unsaved_buffers() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SHAPE, num_attention_heads=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [plain, tied, shared, with_buffers, unsaved_buffers])
def test_tensors_lie_where_save_pretrained_puts_them(
    tmp_path: Path, make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    make().to(dtype).save_pretrained(tmp_path)
    imagined = imagined_file(outline(tmp_path), str(tmp_path / "model.safetensors"))
    bones = skeleton(tmp_path)
    named = {name for name, _ in bones.model.named_parameters()}
    assert named
    assert {name: imagined[name] for name in named} == {name: bones.sources[name] for name in named}
    begin = min(span.offset for source in imagined.values() for span in source.spans)
    stored = Checkpoint.open(tmp_path)
    assert begin == min(span.offset for source in stored.tensors.values() for span in source.spans)


def test_wide_elements_come_first_and_nothing_lies_between() -> None:
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    module.b = torch.nn.Parameter(torch.zeros(5))
    module.c = torch.nn.Parameter(torch.zeros(0))
    module.register_buffer("kept", torch.zeros(2, dtype=torch.int64))
    module.register_buffer("passing", torch.zeros(2), persistent=False)
    found = imagined_file(module, "there")
    assert list(found) == ["a", "b", "c", "kept"]
    assert found["c"].spans == ()
    begins = {name: source.spans[0].offset for name, source in found.items() if source.spans}
    assert begins["b"] - begins["kept"] == 2 * ITEMSIZE["I64"]
    assert begins["a"] - begins["b"] == 5 * ITEMSIZE["F32"]
    assert begins["kept"] % 8 == 0
