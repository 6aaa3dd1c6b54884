"""Codecs of keys and values: full blocks are coded in every tier, and what grows is as it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import penstock
from penstock.kernels.kv_codec import BITS, decode, encode
from penstock.memory.prefix import KvIdentity, PrefixStore
from penstock.runtime.kv.prefix import load_prefix

TOKENS, LONG, BLOCK, TOKEN_NBYTES = 500, 2000, 64, 2 * 32 * 4
SLOTS = {None: 16384, "int8": 8192, "int4": 4096}
"""Whole pages: levels, 8 bytes for each channel of a block, and 8 for each token's value."""
SMALL = {None: "512KiB", "int8": "256KiB", "int4": "128KiB"}
"""Budgets of 28 slots, and reads."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@pytest.fixture
def caches(tmp_path: Path, model: Any) -> Iterator[Callable[..., Any]]:
    made = []

    def make(codec: str | None, *, host: str = "512KiB", disk: str | int = "16MiB", **settings: Any) -> Any:
        budget = {"host": host, "disk": disk}
        cache = penstock.TieredCache(
            model.config, max_memory=budget, block_tokens=BLOCK, disk=tmp_path, codec=codec, **settings
        )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def ids(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(1))


def call(model: Any, cache: Any, some: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=some, past_key_values=cache, use_cache=True).logits
    return logits


def coded(values: torch.Tensor, codec: str, axis: int) -> torch.Tensor:
    """Full blocks as they are after coding, block by block."""
    found = values.clone()
    for start in range(0, values.shape[2] // BLOCK * BLOCK, BLOCK):
        block = values[:, :, start : start + BLOCK]
        levels, low, step = encode(block, BITS[codec], axis)
        found[:, :, start : start + BLOCK] = decode(
            levels, low.unsqueeze(axis), step.unsqueeze(axis), bits=BITS[codec], dim=block.shape[3], dtype=block.dtype
        )
    return found


@pytest.mark.parametrize("codec", list(BITS))
@pytest.mark.parametrize("small", [True, False])
def test_results_are_those_of_coded_blocks(codec: str, small: bool, model: Any, caches: Callable[..., Any]) -> None:
    cache, plain = caches(codec, host=SMALL[codec] if small else "1MiB"), DynamicCache(config=model.config)
    for one in (cache, plain):
        call(model, one, ids(LONG))
    assert (cache.statistics().written_nbytes > 0) == small
    layer = plain.layers[0]
    exact = call(model, plain, ids(1))
    plain.crop(-1)
    layer.keys, layer.values = coded(layer.keys, codec, -2), coded(layer.values, codec, -1)
    expected, got = call(model, plain, ids(1)), call(model, cache, ids(1))
    assert float((got - expected).abs().max()) <= 1e-5
    assert float((got - exact).abs().max()) > 1e-6, "it is lossy"


def test_blocks_take_fewer_bytes_everywhere(model: Any, caches: Callable[..., Any]) -> None:
    for codec, slot in SLOTS.items():
        cache = caches(codec, host=SMALL[codec])
        for start in range(0, LONG, 250):
            call(model, cache, ids(LONG)[:, start : start + 250])
        figures = cache.statistics()
        assert figures.host_nbytes % slot == figures.disk_nbytes % slot == 0
        assert (figures.host_nbytes + figures.disk_nbytes) // slot >= LONG // BLOCK
        assert figures.kv_nbytes == LONG * TOKEN_NBYTES
        assert figures.written_nbytes > 0
        assert figures.written_nbytes % slot == 0
        assert cache.tiers.store(0).layout.slot_nbytes == slot


@pytest.mark.parametrize("codec", list(BITS))
def test_policies_choose_among_coded_blocks(codec: str, model: Any, caches: Callable[..., Any]) -> None:
    """With a budget that holds all the same comes out; with a small one fewer bytes are read."""
    call(model, caches(None), ids(1))
    some = [caches(codec), caches(codec, policy="quest:1000,dense=0")]
    some.append(caches(codec, policy="oracle:100,dense=0", host="1MiB", disk=0))
    got = []
    for cache in some:
        call(model, cache, ids())
        got.append([call(model, cache, ids(1)) for _ in range(3)])
    for one, other in zip(got[0], got[1], strict=True):
        assert float((one - other).abs().max()) <= 1e-5
    chosen = some[1].statistics().chosen
    assert chosen.gathered_nbytes + chosen.read_nbytes >= 0.9 * chosen.whole_nbytes
    assert some[2].statistics().chosen.recall < 1


def test_rows_part_and_are_cropped(model: Any, caches: Callable[..., Any]) -> None:
    inputs = {"input_ids": ids().repeat(2, 1), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}
    inputs["attention_mask"][1, :9] = 0
    settings: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False, "num_beams": 2}
    expected = model.generate(**inputs, **settings)
    cache = caches("int8", host="1MiB")
    got = model.generate(**inputs, **settings, past_key_values=cache)
    assert got.shape == expected.shape
    assert cache.get_seq_length() == TOKENS + 69
    again, plain = caches("int8"), DynamicCache(config=model.config)
    for one in (again, plain):
        call(model, one, ids())
        one.crop(-180)  # into a full block
        call(model, one, ids(30))
    assert float((call(model, again, ids(1)) - call(model, plain, ids(1))).abs().max()) < 0.01


def test_what_is_refused(model: Any, caches: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(penstock.UsageError, match="use int8, int4"):
        caches("int2")
    identity = KvIdentity(weights="w", dtype="float32", rope="", layout="", block_tokens=BLOCK)
    with (
        PrefixStore(tmp_path / "prefixes", 2**20) as store,
        pytest.raises(penstock.UsageError, match="without a codec"),
    ):
        load_prefix(caches("int8"), store, identity, list(range(100)))
