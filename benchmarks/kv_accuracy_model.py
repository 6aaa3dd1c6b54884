"""A small model that looks up pairs: two layers, the least that learn it. Trained on the CPU in minutes, and kept.

Sequences are pairs of a key and its value; keys come again, and each time one does, its value is to be predicted. All
of these places are supervised: with some at the end only, nothing was learned in many more steps. Lengths grow from 16
tokens on, since short ones are learned first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.caches import cache_folder

KEYS, VALUES = 128, 64
LEARNING_RATE, BATCH = 2e-3, 32
LENGTHS = (16, 32, 64, 128, 256)
"""One after the other, as each is learned: by a fixed schedule nothing was, in 250 steps."""
LEARNED, DONE = 0.5, 0.05
"""Losses at which the next length comes, and at which the last one is over."""


def trained(steps: int, *, tell: Callable[[str], None]) -> Any:
    """The model after so many steps at most, from the user's cache if it is there."""
    folder = cache_folder() / "kv-accuracy" / f"pairs-{KEYS}-{VALUES}-{steps}"
    if (folder / "config.json").is_file():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    model = _train(steps, tell)
    model.save_pretrained(folder)
    tell(f"kept in {folder}")
    return model.eval()


def context_of(
    tokens: int, rows: int, questions: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts in which each key is once [rows, tokens], questions [rows, questions], and their answers, likewise."""
    pairs = tokens // 2
    assert pairs <= KEYS, (pairs, KEYS)
    keys = torch.stack([torch.randperm(KEYS, generator=draw)[:pairs] for _ in range(rows)])
    values = torch.randint(KEYS, KEYS + VALUES, (rows, pairs), generator=draw)
    at = torch.stack([torch.randperm(pairs, generator=draw)[torch.arange(questions) % pairs] for _ in range(rows)])
    return torch.stack([keys, values], dim=2).flatten(1), keys.gather(1, at), values.gather(1, at)


def _train(steps: int, tell: Callable[[str], None]) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=KEYS + VALUES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * KEYS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    begin = time.monotonic()
    lengths = list(LENGTHS)
    for step in range(steps):
        length = lengths[0]
        ids, labels = _batch(length, draw)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reached = float(loss.detach())
        if len(lengths) == 1 and reached < DONE:
            break
        if len(lengths) > 1 and reached < LEARNED:
            lengths.pop(0)
        if step % 25 == 0 or step == steps - 1:
            tell(f"step {step}, {length} tokens, loss {reached:.3f}, {time.monotonic() - begin:.0f} s")
    return model


def _batch(length: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [rows, length] in which keys come again, and labels: −100 but for values of keys that were there."""
    pairs = length // 2
    values_of = torch.randint(KEYS, KEYS + VALUES, (BATCH, KEYS), generator=draw)
    some = max(2, min(KEYS, pairs // 2))  # of which about as many come again
    among = torch.stack([torch.randperm(KEYS, generator=draw)[:some] for _ in range(BATCH)])
    keys = among.gather(1, torch.randint(some, (BATCH, pairs), generator=draw))
    ids = torch.stack([keys, values_of.gather(1, keys)], dim=2).flatten(1)
    came = (keys[:, :, None] == keys[:, None, :]).tril(-1).any(dim=2)
    labels = torch.full_like(ids, -100)
    labels[:, 1::2] = torch.where(came, ids[:, 1::2], -100)
    return ids, labels
