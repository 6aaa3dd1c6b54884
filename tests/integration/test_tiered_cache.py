"""A cache in tiers gives what transformers' own gives, to rounding, under budgets that force it to disk."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import penstock

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
NEW = 12


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=512))


def qwen() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1, max_position_embeddings=512))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0)
    )


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None))


def gemma() -> Any:
    shape = SHAPE | {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    config = Gemma2Config(**shape, num_key_value_heads=2, sliding_window=16)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    )


def bart() -> Any:
    shape: dict[str, Any] = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=97, d_model=64, max_position_embeddings=512, forced_eos_token_id=None, **shape)
    )


_BART = {"layers": 3, "attention_heads": 4, "ffn_dim": 64}
DECODERS = [llama, qwen, gpt2, mistral, gemma]


def model_of(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(rows: int, *, tokens: int = 100, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )


def check(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> None:
    expected = generate(model, inputs, **kwargs)
    got = generate(model, inputs, past_key_values=cache, **kwargs)
    assert torch.equal(got.sequences, expected.sequences)
    worst = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits, strict=True))
    assert worst <= 1e-5


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(model: Any, *, host: int | str = "208KiB", disk: int | str = "16MiB", block_tokens: int = 4) -> Any:
        budget = {"host": host, "disk": disk}
        cache = penstock.TieredCache(model.config, max_memory=budget, block_tokens=block_tokens, disk=tmp_path)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()
    assert not list(tmp_path.glob("*/")), "a folder was left behind"


@pytest.mark.parametrize(
    ("make", "rows", "padding", "kwargs"),
    [
        *((make, 1, 0, {}) for make in DECODERS),
        *((make, 3, 7, {}) for make in (llama, gemma)),
        *((make, 1, 0, {"prefill_chunk_size": 24}) for make in (qwen, gpt2)),
        *((make, 3, 15, {"prefill_chunk_size": 24}) for make in DECODERS),
    ],
)
def test_generation_equals_that_of_a_resident_cache(
    make: Callable[[], Any], rows: int, padding: int, kwargs: Any, caches: Callable[..., Any]
) -> None:
    model = model_of(make)
    for _ in range(2):  # the second one knows from its first call on that blocks will do
        cache = caches(model, host="128KiB" if rows == 1 else "256KiB")
        check(model, cache, prompts(rows, padding=padding), **kwargs)
        figures = cache.statistics()
        assert figures.written_nbytes > 0
        assert figures.read_nbytes > figures.written_nbytes
        assert figures.host_nbytes <= figures.arena_nbytes <= figures.host_budget_nbytes


@pytest.mark.parametrize(("make", "block_tokens"), [(llama, 32), (gpt2, 8)])
@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_share_what_is_sealed(
    make: Callable[[], Any], block_tokens: int, kwargs: Any, caches: Callable[..., Any]
) -> None:
    model = model_of(make)
    cache = caches(model, host="256KiB", block_tokens=block_tokens)  # blocks are whole pages
    check(model, cache, prompts(2, padding=5), **kwargs)
    figures = cache.statistics()
    assert figures.host_nbytes + figures.disk_nbytes < 0.8 * figures.kv_nbytes


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}])
def test_encoder_decoders(make: Callable[[], Any], kwargs: Any, caches: Callable[..., Any]) -> None:
    model = model_of(make)
    cache = caches(model, host="208KiB", block_tokens=1)
    check(model, cache, prompts(2, padding=9), **kwargs)
    assert cache.statistics().written_nbytes > 0


def test_what_models_do_more_with_is_put_together_and_said_once(
    caches: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(t5)
    with caplog.at_level(logging.WARNING, logger="penstock"):
        check(model, caches(model), prompts(1))
    assert [record.getMessage() for record in caplog.records if "put together" in record.getMessage()] == [
        "keys and values of layer 0 (and perhaps of others) are put together for each call: this model does more with "
        "them than to attend to them. Results are right, and memory for one layer of the whole context is needed "
        "besides."
    ]


def test_an_attention_that_cannot_be_replaced_gets_all(
    caches: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(llama)
    inputs = prompts(2, padding=3)
    expected = generate(model, inputs)
    model.config._attn_implementation = "flex_attention"
    cache = caches(model, host="256KiB")
    model.config._attn_implementation = "sdpa"
    got = generate(model, inputs, past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert cache.statistics().read_nbytes > 0
    assert "cannot be replaced" in caplog.text


def test_other_caches_are_not_touched(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    inputs = prompts(2, padding=3)
    expected = generate(model, inputs)
    caches(model)
    assert model.config._attn_implementation == "penstock_tiered"
    got = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


def test_turns_of_a_chat_go_on_in_the_same_cache(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="128KiB")
    ids = prompts(1, tokens=50)["input_ids"]
    more = torch.randint(1, 97, (1, 30), generator=torch.Generator().manual_seed(3))
    first = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    second = torch.cat([first, more], dim=1)
    check(model, cache, {"input_ids": second, "attention_mask": torch.ones_like(second)})


def test_cropping_into_what_is_on_disk(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="128KiB")
    inputs = prompts(1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for kept in (90, 61, 40):
            cache.crop(kept - cache.get_seq_length())
            assert cache.get_seq_length() == kept
            got = model(input_ids=inputs["input_ids"][:, kept:], past_key_values=cache).logits
            expected = model(input_ids=inputs["input_ids"]).logits[:, kept:]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_rows_are_selected_and_repeated(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="256KiB")
    ids = prompts(3)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = ids[[2, 2, 0, 0]]
        more = torch.randint(1, 97, (4, 9), generator=torch.Generator().manual_seed(4))
        got = model(input_ids=more, past_key_values=cache).logits
        expected = model(input_ids=torch.cat([rows, more], dim=1)).logits[:, -9:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_assisted_generation(caches: Callable[..., Any]) -> None:
    model, assistant = model_of(llama), model_of(llama)
    with torch.no_grad():
        assistant.lm_head.weight += 0.02 * torch.randn(97, 64, generator=torch.Generator().manual_seed(2))
    check(model, caches(model, host="128KiB"), prompts(1), assistant_model=assistant)


def test_masks_with_holes(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    inputs = prompts(2, padding=6)
    inputs["attention_mask"][0, 30:40] = 0
    inputs["attention_mask"][1, 11] = 0
    check(model, caches(model, host="256KiB"), inputs)
    check(model, caches(model, host="256KiB"), inputs)


def test_padding_that_is_shown_later_is_refused(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="256KiB")
    inputs = prompts(2, padding=6)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(penstock.UsageError, match="positions that were padding"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


def test_half_numbers(caches: Callable[..., Any]) -> None:
    model = model_of(llama).to(torch.bfloat16)
    ids = prompts(1, tokens=200)["input_ids"]
    cache = caches(model, host="128KiB")
    with torch.no_grad():
        model(input_ids=ids[:, :150], past_key_values=cache)
        got = model(input_ids=ids[:, 150:], past_key_values=cache).logits
        expected = model(input_ids=ids).logits[:, 150:]
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_only_what_is_new_is_written(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="256KiB", block_tokens=64)
    token_nbytes = 3 * 2 * 2 * 8 * 4
    with torch.no_grad():
        model(input_ids=prompts(1, tokens=640)["input_ids"], past_key_values=cache)
        before = cache.statistics().written_nbytes
        for _ in range(192):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    figures = cache.statistics()
    assert 0 < figures.written_nbytes - before <= 1.1 * 192 * token_nbytes
    assert figures.appended_nbytes == (640 + 192) * token_nbytes


def test_budgets_are_hard(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="128KiB", disk="48KiB")
    with pytest.raises(penstock.DoesNotFitError, match=r"keys and values need .* of the host tier") as told:
        generate(model, prompts(1, tokens=300), past_key_values=cache)
    assert "disk has 0 slots free" in str(told.value)
    with pytest.raises(penstock.DoesNotFitError, match=r"3 layers need .* bytes of host memory at least"):
        generate(model, prompts(4), past_key_values=caches(model, host="24KiB"))
    cache.reset()
    check(model, cache, prompts(1, tokens=5))


def test_host_memory_alone(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="1MiB", disk=0)
    check(model, cache, prompts(2, padding=3))
    assert cache.statistics().written_nbytes == 0


def test_files_are_private_and_go(caches: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(llama)
    cache = caches(model, host="128KiB")
    generate(model, prompts(1), past_key_values=cache)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in folders] == [0o700]
    files = list(folders[0].iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in files} == {0o600}
    cache.close()
    cache.close()
    assert not folders[0].exists()


def test_gradients_are_refused(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    with pytest.raises(penstock.UsageError, match="no graph of gradients"):
        model(**prompts(1), past_key_values=caches(model))


def test_a_cache_that_is_dropped_frees_its_memory(tmp_path: Path) -> None:
    model = model_of(llama)
    cache = penstock.TieredCache(
        model.config, max_memory={"host": "128KiB", "disk": "1MiB"}, block_tokens=4, disk=tmp_path
    )
    generate(model, prompts(1), past_key_values=cache)
    assert [path for path in tmp_path.iterdir() if path.is_dir()]
    del cache
    assert not [path for path in tmp_path.glob("*") if path.is_dir()]


def test_arguments() -> None:
    model = model_of(llama)
    with pytest.raises(penstock.UsageError, match="no memory of its own"):
        penstock.TieredCache(model.config, max_memory={"device": "1GiB", "host": "1GiB"}, device="cpu")
    with pytest.raises(penstock.UsageError, match="say how much host memory"):
        penstock.TieredCache(model.config, max_memory={"device": "1GiB"}, device="emulated:h2d=1GiB/s")
    with pytest.raises(penstock.UsageError, match="block_tokens is 0"):
        penstock.TieredCache(model.config, max_memory={"host": "1MiB", "disk": 0}, block_tokens=0)
