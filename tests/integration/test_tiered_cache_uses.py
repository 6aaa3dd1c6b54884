"""What programs do with caches and models besides one generation, with a cache in tiers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import penstock
from penstock.memory.errors import ClosedError, UsageError
from penstock.runtime.kv.identity import rope_depends_on_length

SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=512, **more)
    return LlamaForCausalLM(config).eval()


def cache_of(model: Any, folder: Path, *, host: str = "128KiB") -> Any:
    return penstock.TieredCache(model.config, max_memory={"host": host, "disk": "16MiB"}, block_tokens=4, disk=folder)


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def shown(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Those of what is no padding."""
    return logits[mask.bool()]


@torch.no_grad()
def test_a_model_that_compares_the_names_of_attentions_keeps_its_branch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**SHAPE, new_decoder_architecture=False, alibi=False)).eval()
    inputs = padded()
    before = shown(model(**inputs, use_cache=False).logits, inputs["attention_mask"])
    cache = cache_of(model, tmp_path, host="256KiB")
    without = shown(model(**inputs, use_cache=False).logits, inputs["attention_mask"])
    dynamic = shown(model(**inputs, past_key_values=DynamicCache()).logits, inputs["attention_mask"])
    tiered = shown(model(**inputs, past_key_values=cache).logits, inputs["attention_mask"])
    cache.close()
    assert torch.equal(without, before)
    for found in (dynamic, tiered):
        torch.testing.assert_close(found, before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    model, inputs = llama(), padded()
    cache = cache_of(model, tmp_path, host="256KiB")
    model(**inputs, past_key_values=cache)
    cache.close()
    with pytest.raises(ClosedError, match="make a new one"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    assert not list(tmp_path.glob("*/"))


def test_a_cache_goes_on_outside_of_inference_mode(tmp_path: Path) -> None:
    model = llama()
    ids = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(2))
    cache = cache_of(model, tmp_path)
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
    with torch.no_grad():
        got = model(ids[:, 10:], past_key_values=cache).logits
        expected = model(ids).logits[:, 10:]
    cache.close()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_change_places_take_their_padding_along(tmp_path: Path) -> None:
    model, inputs = llama(), padded()
    found = []
    for cache in (DynamicCache(config=model.config), cache_of(model, tmp_path, host="256KiB")):
        model(**inputs, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 0]))
        mask = torch.cat([inputs["attention_mask"][[1, 0]], torch.ones(2, 1, dtype=torch.long)], dim=1)
        positions = (mask.sum(dim=1, keepdim=True) - 1).long()
        token = torch.tensor([[5], [6]])
        found.append(model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    cache.close()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_after_a_reset_blocks_may_be_larger(tmp_path: Path) -> None:
    model = llama().bfloat16()
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(3))
    cache = cache_of(model, tmp_path, host="160KiB")
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    cache.reset()
    model.float()
    got = [model(ids[:, :50], past_key_values=cache).logits, model(ids[:, 50:], past_key_values=cache).logits]
    cache.close()
    torch.testing.assert_close(torch.cat(got, dim=1), model(ids).logits, atol=1e-5, rtol=0)


def test_a_cache_is_not_copied(tmp_path: Path) -> None:
    cache = cache_of(llama(), tmp_path)
    with pytest.raises(UsageError, match="not copied"):
        copy.deepcopy(cache)
    cache.close()


@pytest.mark.parametrize(
    ("rope", "depends"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, False),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, True),
    ],
)
def test_keys_that_turn_with_the_length_of_a_prompt_are_known(rope: dict[str, Any], depends: bool) -> None:
    assert rope_depends_on_length(llama(rope_parameters=rope).config) is depends
