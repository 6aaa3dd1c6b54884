"""How models attend, found out from their classes alone, against what their first call shows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import penstock
from penstock.runtime.kv.layer import Way
from penstock.runtime.kv.probe import probe
from penstock.runtime.kv.reader import KvReader

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class Odd(LlamaForCausalLM):
    """Passes something to attention that nobody knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, odd=1, **kwargs)


class Closed(LlamaForCausalLM):
    """Cannot be called without numbers."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        assert int(input_ids.sum()) >= 0
        return super().forward(input_ids=input_ids, **kwargs)


def llama(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SHAPE, **HEADS)).eval()


@pytest.fixture
def cache_of(tmp_path: Path) -> Iterator[Any]:
    made = []

    def make(model: Any) -> Any:
        made.append(penstock.TieredCache(model.config, max_memory={"host": "1MiB", "disk": 0}, block_tokens=4))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def shown(cache: Any, model: Any) -> dict[int, bool]:
    """What two calls of the model itself show."""
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    return {number: layer.way is Way.BLOCKS for number, layer in enumerate(cache._tiered)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(LlamaForCausalLM),
        lambda: llama(Odd),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4)).eval(),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS, head_dim=16, sliding_window=8)).eval(),
    ],
    ids=["llama", "odd", "gpt2", "gemma2"],
)
def test_it_finds_what_the_first_call_shows(make: Any, cache_of: Any) -> None:
    model = make()
    found = probe(model)
    assert found == shown(cache_of(model), model)
    assert probe(model) == found  # now that the config was switched


def test_what_cannot_be_called_is_left_to_its_first_call(cache_of: Any) -> None:
    model = llama(Closed)
    cache = cache_of(model)
    cache.look_at(model)
    assert {layer.way for layer in cache._tiered} == {Way.UNKNOWN}
    assert shown(cache, model) == {0: True, 1: True}


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Odd])
def test_a_cache_that_is_filled_first(kind: Any, cache_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(kind)
    ids = torch.arange(1, 12)[None]
    before = cache_of(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 8:]
        model(input_ids=ids[:, :8], past_key_values=before)
    stranger = copy.deepcopy(model)  # with a config of its own, of which nothing is known
    cache = cache_of(stranger)
    assert {layer.way for layer in cache._tiered} == {Way.UNKNOWN}
    for number in range(2):
        cache.tiers.append(number, *before.tiers.reader.whole(number))
    cache.look_at(stranger)
    if kind is LlamaForCausalLM:
        monkeypatch.setattr(KvReader, "whole", None)  # nothing is put together any more
    with torch.no_grad():
        got = stranger(input_ids=ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
