"""A cache and the prefix store: what is read equals what is computed, and what is damaged is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM

import penstock
from penstock.runtime.kv.identity import identity_of, weights_fingerprint
from penstock.runtime.kv.prefix import load_prefix, store_prefix

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
SIZE = 4
IDS = torch.randint(1, 97, (1, 103), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.arange(9.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with penstock.PrefixStore(tmp_path / "store", "64MiB") as made:
        yield made


@pytest.fixture
def cache_of(model: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(host: str = "128KiB") -> Any:
        budget = {"host": host, "disk": "16MiB"}
        made.append(penstock.TieredCache(model.config, max_memory=budget, block_tokens=SIZE, disk=tmp_path / "kv"))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def identity(model: Any, weights: Path, **kwargs: Any) -> Any:
    return identity_of(weights, model.config, model.dtype, block_tokens=SIZE, **kwargs)


def test_what_is_read_equals_what_is_computed(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any]
) -> None:
    tokens = IDS[0].tolist()
    name = identity(model, weights)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        first = cache_of()
        assert load_prefix(first, store, name, tokens).tokens == 0
        model(input_ids=IDS, past_key_values=first)
        report = store_prefix(first, store, name, tokens)
        assert (report.stored_blocks, report.known_blocks, report.reason) == (25, 0, "")
        assert store_prefix(first, store, name, tokens).stored_blocks == 0
        for host in ("128KiB", "1MiB"):
            cache = cache_of(host)
            loaded = load_prefix(cache, store, name, tokens)
            assert loaded.tokens == cache.get_seq_length() == 100
            got = model(input_ids=IDS[:, 100:], past_key_values=cache).logits
            torch.testing.assert_close(got, expected[:, 100:], atol=1e-5, rtol=0)
            more = model(input_ids=IDS[:, :1], past_key_values=cache).logits
            whole = model(input_ids=torch.cat([IDS, IDS[:, :1]], dim=1)).logits[:, -1:]
            torch.testing.assert_close(more, whole, atol=1e-5, rtol=0)


def test_a_prompt_that_begins_alike_gets_what_is_alike(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any]
) -> None:
    name = identity(model, weights)
    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, IDS[0].tolist())
    other = [*IDS[0, :50].tolist(), 1, 2, 3]
    cache = cache_of()
    assert load_prefix(cache, store, name, other).tokens == 48
    assert load_prefix(cache_of(), store, identity(model, weights, salt="another"), IDS[0].tolist()).tokens == 0
    with pytest.raises(penstock.UsageError, match="has 48 tokens already"):
        load_prefix(cache, store, name, other)


def test_what_is_damaged_is_computed(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any], tmp_path: Path
) -> None:
    tokens, name = IDS[0].tolist(), identity(model, weights)
    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, tokens)
        segment = max((tmp_path / "store").iterdir(), key=lambda file: file.stat().st_size)
        with open(segment, "r+b") as stream:
            stream.seek(segment.stat().st_size // 2)
            stream.write(b"\xff" * 64)
        cache = cache_of()
        loaded = load_prefix(cache, store, name, tokens).tokens
        assert loaded < 100
        got = model(input_ids=IDS[:, loaded:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(input_ids=IDS).logits[:, loaded:], atol=1e-5, rtol=0)


def test_weights_that_change_have_another_name(model: Any, weights: Path, tmp_path: Path) -> None:
    before = weights_fingerprint(weights)
    assert weights_fingerprint(weights) == before
    save_file({"a": torch.arange(9.0) + 1}, weights / "model.safetensors")
    assert weights_fingerprint(weights) != before
    with pytest.raises(penstock.UsageError, match="no safetensors files"):
        weights_fingerprint(tmp_path)
    name = identity(model, weights)
    model.config.rope_parameters = dict(model.config.rope_parameters, rope_theta=5e5)
    assert identity(model, weights).root() != name.root()


def test_layers_that_are_kept_elsewhere_have_no_prefix(weights: Path, store: Any) -> None:
    shape = SHAPE | {"num_hidden_layers": 2}
    config = Gemma2Config(**shape, **HEADS, sliding_window=8)
    cache = penstock.TieredCache(config, max_memory={"host": "1MiB", "disk": 0}, block_tokens=SIZE)
    name = identity_of(weights, config, torch.float32, block_tokens=SIZE)
    with pytest.raises(penstock.UsageError, match="in no tier"):
        load_prefix(cache, store, name, [1, 2, 3])
    cache.close()
