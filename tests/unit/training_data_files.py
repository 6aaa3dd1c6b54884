"""Small tokenizers and files of training data. Words are w0 … w49, and a word is a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
UNKNOWN, BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))
FIRST_WORD = len(SPECIAL)
WORDS = 50

PLAIN = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role != 'assistant' or loop.last %}"
    "{{ message.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Leaves out what the assistant said earlier, as templates of reasoning models do with thoughts."""


def word_tokenizer(
    *, template: str | None = None, bos: bool = True, eos: bool = True, words: int = WORDS
) -> PreTrainedTokenizerFast:
    vocabulary = {name: number for number, name in enumerate((*SPECIAL, *(f"w{number}" for number in range(words))))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named = {"eos_token": "</s>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", **named
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[SYSTEM:])})
    tokenizer.chat_template = template
    return tokenizer


def letter_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A letter is a token, but for "ab", which is one."""
    letters = " abcdefg"
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"ab": len(letters)}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = template
    return tokenizer


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def ids(*numbers: int) -> list[int]:
    return [FIRST_WORD + number for number in numbers]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
