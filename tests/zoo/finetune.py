"""A checkpoint small enough to be trained in a test, a tokenizer whose tokens are bytes, and text that comes with
Python."""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({END: 0, **{letter: number for number, letter in enumerate(alphabet, 1)}}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def write_checkpoint(folder: Path, *, layers: int = 3, positions: int = 256, **options: Any) -> Path:
    """Random weights, the same each time."""
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 257}
    config = LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **{**shape, **options},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def zen() -> str:
    """The Zen of Python, whose module keeps it from who only looks at the source."""
    found = importlib.util.find_spec("this")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text()
    quoted = re.search(r'"""(.*?)"""', source, re.DOTALL)
    assert quoted is not None
    return codecs.decode(quoted[1], "rot13")


def write_rows(path: Path) -> Path:
    """The Zen, a line a row."""
    rows = [{"text": line} for line in zen().splitlines() if line]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
