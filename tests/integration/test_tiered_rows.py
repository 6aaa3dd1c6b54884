"""Rows of a batch that are the same row again, stored once; compared with transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import penstock

LAYERS, TOKENS, NEW = 2, 200, 12
TOKEN_NBYTES = LAYERS * 2 * 2 * 16 * 4
"""Keys and values of a token in all layers: heads, their size, and fp32."""


def llama(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def caches(tmp_path: Path, model: Any) -> Iterator[Callable[..., Any]]:
    made = []

    def make(one: Any = model, **settings: Any) -> Any:
        budget = {"host": "256KiB", "disk": "16MiB"}
        made.append(
            penstock.TieredCache(one.config, max_memory=budget, block_tokens=8, disk=tmp_path / "kv", **settings)
        )
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def answer(model: Any, cache: Any, **how: Any) -> torch.Tensor:
    torch.manual_seed(2)
    ids = prompt()
    made: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW, **how
    )
    return made


@pytest.mark.parametrize(
    ("how", "rows", "settings"),
    [
        ({"num_return_sequences": 4, "do_sample": True}, 4, {}),
        ({"num_return_sequences": 4, "do_sample": True, "prefill_chunk_size": 50}, 4, {}),
        ({"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "prefill_chunk_size": 64}, 3, {}),
        ({"num_return_sequences": 3, "do_sample": True, "prefill_chunk_size": 70}, 3, {"policy": "quest:4096,dense=0"}),
    ],
)
def test_answers_to_one_prompt_share_it(
    model: Any, caches: Callable[..., Any], how: dict[str, Any], rows: int, settings: dict[str, str]
) -> None:
    cache = caches(**settings)
    assert torch.equal(answer(model, cache, **how), answer(model, DynamicCache(config=model.config), **how))
    figures = cache.statistics()
    assert (figures.rows, figures.kv_nbytes) == (rows, rows * (TOKENS + NEW - 1) * TOKEN_NBYTES)
    assert figures.appended_nbytes == (TOKENS + rows * (NEW - 1)) * TOKEN_NBYTES
    blocks = TOKENS // 8 + rows * (-(-NEW // 8) + 1)
    assert figures.host_nbytes + figures.disk_nbytes <= 2 * LAYERS * blocks * 4096  # disk has some that memory has, too


@torch.no_grad()
def test_rows_that_are_alike_for_a_while(model: Any, caches: Callable[..., Any]) -> None:
    """Two rows begin alike and part within a block, one is only padded otherwise, and one is another prompt."""
    ids = prompt(2)[[0, 0, 0, 1]]
    ids[1, 101:] = ids[3, 101:]
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    found = []
    for cache in (DynamicCache(config=model.config), caches()):
        parts = []
        for start, stop in ((0, 60), (60, 101), (101, 102), (102, TOKENS)):
            shown = mask[:, :stop]
            positions = (shown.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
            parts.append(
                model(ids[:, start:stop], attention_mask=shown, position_ids=positions, past_key_values=cache).logits
            )
        found.append(torch.cat(parts, dim=1)[mask.bool()])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    table = cache.tiers.store(0).table
    blocks = [[part.block for part in table.parts(row, 0)] for row in range(4)]
    assert blocks[0][:12] == blocks[1][:12]
    assert not set(blocks[0][12:]) & set(blocks[1][12:])
    assert not set(blocks[0]) & (set(blocks[2]) | set(blocks[3]))


@pytest.mark.parametrize("codec", ["int8", "int4"])
@torch.no_grad()
def test_coded_rows_are_what_each_is_by_itself(caches: Callable[..., Any], codec: str) -> None:
    """Prompts in pieces, rows that are alike and part, places that change, a crop into a coded block.

    Keys of one layer depend on nothing but tokens, so that levels are the same whoever attends with whom.
    """
    model = llama(layers=1)
    ids, more = prompt(2)[[0, 0, 1]], torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19], [25, 26, 27, 28, 29]])

    def run(rows: list[int]) -> torch.Tensor:
        cache = caches(model, codec=codec)
        parts = [
            model(ids[rows, :90], past_key_values=cache).logits,
            model(ids[rows, 90:], past_key_values=cache).logits,
        ]
        parts += [model(more[rows, at : at + 1], past_key_values=cache).logits for at in range(4)]
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        parts.append(model(more[rows[::-1], 4:], past_key_values=cache).logits.flip(0))
        cache.crop(-30)
        parts.append(model(more[rows[::-1]], past_key_values=cache).logits.flip(0))
        return torch.cat(parts, dim=1)

    together = run([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row], run([row] * 3)[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_gives_its_keys_and_values_to_another_one(model: Any, caches: Callable[..., Any]) -> None:
    cache, own = caches(), DynamicCache(config=model.config)
    assert [layer[:2] for layer in cache] == [(None, None)] * LAYERS
    for one in (cache, own):
        model(prompt(2), past_key_values=one)
    for (keys, values, *_), (own_keys, own_values, *_) in zip(cache, own, strict=True):
        assert torch.equal(keys, own_keys)
        assert torch.equal(values, own_values)
    other = DynamicCache([(keys, values) for keys, values, *_ in cache])
    token = torch.tensor([[5], [6]])
    got = model(token, past_key_values=other).logits
    torch.testing.assert_close(got, model(token, past_key_values=own).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [TOKENS - 1, 60, 31, 12])
@torch.no_grad()
def test_a_crop_into_padding_leaves_room_for_tokens(model: Any, caches: Callable[..., Any], keep: int) -> None:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    found = []
    for cache in (DynamicCache(config=model.config), caches()):
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(keep - TOKENS)
        shown = torch.cat([mask[:, :keep], torch.ones(2, 51, dtype=torch.long)], dim=1)
        parts = [
            model(part, attention_mask=shown[:, :stop], past_key_values=cache).logits
            for part, stop in ((ids[:, :50], keep + 50), (ids[:, :1], keep + 51))
        ]
        found.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
