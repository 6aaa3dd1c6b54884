"""Where sentences end: by the tokenizer, by the ids that a model is called with, and as a policy hears of it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.finetune import byte_tokenizer

import penstock
from penstock.cli.kv_cache import make_cache
from penstock.cli.kv_option import KvOption, read_policy
from penstock.cli.text import sentence_ends
from penstock.runtime.kv.sentences import SentenceEnds
from penstock.scheduler.kv.policies.policy import Heads, Setting
from penstock.scheduler.kv.policies.sentences import Sentences

END = 7
POLICY = "sentencekv:160,recent=8,dense=0"


class Words:
    """A tokenizer with a token for each of these."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self._words)}

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return ["".join(self._words[token] for token in row) for row in ids]


def test_tokens_that_end_a_sentence() -> None:
    ends = (".", " end.", "?", "!", "…", "。", '."', ".”", ".)", "\n", "\n\n", "; \n  ", ". ")
    others = ("a", " the", ",", "3.1", ".5", "e.g", "", " ", ":", '"', "\nand")
    assert sentence_ends(Words(*ends, *others)) == set(range(len(ends)))


def test_a_real_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    ends = sentence_ends(tokenizer)
    assert ends == {tokenizer.get_vocab()[token] for token in (".", "!", "?", "Ċ")}


def test_what_was_heard_is_told_by_position() -> None:
    ends = SentenceEnds({2, 5})
    ends.hear(torch.tensor([[1, 2, 3], [5, 5, 1]]), 0)
    ends.hear(torch.tensor([[2], [1]]), 3)
    assert [ends.within(row, 0, 4).tolist() for row in (0, 1)] == [[1, 3], [0, 1]]
    assert ends.within(0, 2, 4).tolist() == [3]
    ends.hear(torch.tensor([[1, 2], [2, 1]]), 2)  # after a crop
    assert [ends.within(row, 0, 4).tolist() for row in (0, 1)] == [[1, 3], [0, 1, 2]]
    ends.hear(torch.tensor([[2], [2]]), 6)  # nobody told of two positions before
    assert ends.within(0, 0, 7).tolist() == [1, 3, 6]
    ends.hear(torch.tensor([[2]]), 4)  # another batch
    assert ends.within(0, 0, 5).tolist() == [4]
    assert ends.within(1, 0, 5).tolist() == []


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    made: Any = LlamaForCausalLM(config).eval()
    made.penstock = SimpleNamespace(device=None)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


def expected_bounds(ids: list[int], longest: int) -> list[int]:
    """Where sentences begin: behind each end, and where one is as long as may be; the last one is not over."""
    bounds = [0]
    for at, token in enumerate(ids):
        if token == END or at + 1 - bounds[-1] == longest:
            bounds.append(at + 1)
    return bounds


def of_rows(cache: Any) -> list[list[list[int]]]:
    """Bounds that policies have, by layer and row."""
    return [[made._bounds for made in layer._choosing._policies] for layer in cache._tiered]


def ids_of(rows: int, count: int) -> Tensor:
    ids = torch.randint(8, 97, (rows, count), generator=torch.Generator().manual_seed(3))
    places = torch.rand(rows, count, generator=torch.Generator().manual_seed(4)) < 0.05
    return ids.masked_fill(places, END)


@pytest.mark.parametrize("chunk", [None, 100])
def test_policies_hear_of_all_ends_of_a_run(model: Any, chunk: int | None) -> None:
    option = KvOption(host=2**22, disk=0, choice=read_policy(POLICY))
    tokenizer = Words(*("." if token == END else "a" for token in range(97)))
    cache = make_cache(model, option, None, "cpu", tokenizer)
    pieces = {} if chunk is None else {"prefill_chunk_size": chunk}
    made = model.generate(
        input_ids=ids_of(1, 400), max_new_tokens=40, do_sample=True, past_key_values=cache, use_cache=True, **pieces
    )[0].tolist()
    bounds = expected_bounds(made[:-1], cache.tiers.block_tokens)
    # one that has no end yet is cut when the next choice is made
    for layer in of_rows(cache):
        assert layer[0] == bounds
    assert any(made[bound - 1] == END for bound in bounds[1:])
    cache.close()


def test_padded_rows_have_ends_of_their_own(model: Any) -> None:
    cache = penstock.TieredCache(model.config, max_memory={"host": "4MiB", "disk": 0}, policy=POLICY)
    cache.look_at(model)
    cache.hear_sentences(model, {END})
    ids = ids_of(2, 300)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    with torch.no_grad():
        for start, stop in ((0, 298), (298, 299), (299, 300)):
            model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
    longest = cache.tiers.block_tokens
    for layer in of_rows(cache):
        assert layer == [expected_bounds(ids[0].tolist(), longest), expected_bounds(ids[1, 37:].tolist(), longest)]
    cache.close()


def test_without_a_tokenizer_the_policy_is_refused(model: Any) -> None:
    option = KvOption(host=2**22, disk=0, choice=read_policy(POLICY))
    with pytest.raises(penstock.UsageError, match="without a tokenizer nobody knows where they end"):
        make_cache(model, option, None, "cpu", None)


def test_a_cache_that_is_gone_listens_no_more(model: Any) -> None:
    cache = penstock.TieredCache(model.config, max_memory={"host": "4MiB", "disk": 0}, policy=POLICY)
    cache.hear_sentences(model, {END})
    assert len(model._forward_pre_hooks) == 1
    gone = weakref.ref(cache)
    cache.close()
    del cache
    gc.collect()
    assert gone() is None
    assert not model._forward_pre_hooks


def test_ends_of_a_block_are_not_told_twice() -> None:
    """A sentence that ends where a block's length does is one sentence."""
    setting = Setting(budget_tokens=64, block_tokens=8, sinks=4, recent=8)
    policy = Sentences(Heads(kv_heads=1, group=1, dim=4, itemsize=4), setting)
    policy.appended(np.ones((1, 16, 4), np.float32))
    policy.ended(np.array([7, 11]))
    assert policy._bounds == [0, 8, 12]
