"""Policies of selection run models: what they choose is attended to, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import penstock
from penstock.cli.kv_cache import make_cache
from penstock.cli.kv_option import KvOption, read_policy
from penstock.runtime.kv.placement import Numbers
from penstock.runtime.kv.reading import ReadAhead
from penstock.runtime.kv.spill import SpillFile
from penstock.runtime.kv.stored import StoredRow
from penstock.scheduler.kv.policies import POLICIES
from penstock.scheduler.kv.policies.policy import Selection

TOKENS, NEW, BLOCK, HEADS, TOKEN_NBYTES = 700, 5, 32, 2, 128
LOSSY = [name for name in POLICIES if name != "exact"]
READ_ALL = ("sparq", "oracle")  # which take no disk
SMALL = "160,recent=8,dense=0,recall=1"


@pytest.fixture(scope="module")
def model() -> Any:
    return known(llama(2))


def llama(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "q_proj" in name:
                weight *= 60.0  # so that attention is not the same everywhere
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


def known(made: Any) -> Any:
    """A model that a cache has seen before: from then on the first call is ours as well."""
    with Cache(made, Path(), host="1MiB", disk=0) as cache, torch.no_grad():
        for _ in range(2):
            made(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    return made


class Cache:
    """A cache that is closed."""

    def __init__(self, made: Any, folder: Path, **settings: Any) -> None:
        budget = {tier: settings.pop(tier) for tier in ("host", "disk")}
        disk = None if folder == Path() else folder
        self.cache = penstock.TieredCache(made.config, max_memory=budget, block_tokens=BLOCK, disk=disk, **settings)

    def __enter__(self) -> Any:
        return self.cache

    def __exit__(self, *error: object) -> None:
        self.cache.close()


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(model: Any, policy: str, *, host: str = "128KiB", disk: str | int = "16MiB", **settings: Any) -> Any:
        if policy.startswith(READ_ALL):
            host, disk = "1MiB", 0
        cache = Cache(model, tmp_path, host=host, disk=disk, policy=policy, **settings).cache
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def inputs(rows: int = 1, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 97, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, asked: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    return model.generate(
        **asked, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )


def steps(model: Any, cache: Any, ids: torch.Tensor, pieces: Sequence[int]) -> list[torch.Tensor]:
    """Logits of calls with so many tokens each."""
    found, at = [], 0
    with torch.no_grad():
        for count in pieces:
            found.append(model(input_ids=ids[:, at : at + count], past_key_values=cache, use_cache=True).logits)
            at += count
    return found


@pytest.mark.parametrize("name", LOSSY)
def test_a_budget_that_holds_all_gives_what_attention_to_all_gives(
    name: str, model: Any, caches: Callable[..., Any]
) -> None:
    asked = inputs(2, padding=7)
    expected = generate(model, asked)
    cache = caches(model, f"{name}:1000,dense=0,recall=1", host="256KiB")
    got = generate(model, asked, past_key_values=cache, prefill_chunk_size=150)
    assert torch.equal(got.sequences, expected.sequences)
    worst = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits, strict=True))
    assert worst <= 1e-5
    figures = cache.statistics()
    assert (figures.read_nbytes > 0) == (name not in READ_ALL)
    assert figures.chosen.recall == pytest.approx(1.0, abs=1e-5)
    assert figures.chosen.policy == f"{name}:1000"


def test_a_window_is_what_a_mask_says(model: Any, caches: Callable[..., Any]) -> None:
    ids = inputs()["input_ids"]
    cache = caches(model, f"window:{SMALL}")
    pieces = [TOKENS - NEW] + [1] * NEW
    got = steps(model, cache, ids, pieces)
    plain = DynamicCache(config=model.config)
    expected = steps(model, plain, ids, pieces[:1])
    for at in range(TOKENS - NEW, TOKENS):
        seen = torch.zeros(1, 1, 1, at + 1, dtype=torch.bool)
        seen[..., :4] = seen[..., at + 1 - 156 :] = True
        with torch.no_grad():
            one = model(input_ids=ids[:, at : at + 1], attention_mask=seen, past_key_values=plain, use_cache=True)
        expected.append(one.logits)
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) <= 1e-5
    assert float((got[-1] - steps(model, None, ids, [TOKENS])[0][:, -1:]).abs().max()) > 1e-3


class Spy:
    """What policies chose, where it was then, and which slots were read."""

    def __init__(self, cache: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted: list[set[tuple[str, int]]] = []
        self.host_nbytes = 0
        self.read: set[tuple[str, int]] = set()
        kind, choose, read = POLICIES[name], POLICIES[name].select, SpillFile.read
        layers = iter(range(10**6))

        def select(policy: Any, query: Any, keys: Any) -> Selection:
            selection = choose(policy, query, keys)
            self.chose(cache, next(layers) % 2, selection, query.tokens)
            return selection

        def reading(file: Any, first: int, count: int, *args: Any, **kwargs: Any) -> Any:
            self.read |= {(file.path, first + number) for number in range(count)}
            return read(file, first, count, *args, **kwargs)

        monkeypatch.setattr(kind, "select", select)
        monkeypatch.setattr(SpillFile, "read", reading)

    def chose(self, cache: Any, layer: int, selection: Selection, tokens: int) -> None:
        store = cache.tiers.store(layer)
        places = store.placement().places(0)
        wanted = set()
        for head in range(HEADS):
            ids = selection.tokens(head, tokens)
            blocks = ids // BLOCK
            whole = blocks < len(places.blocks)
            on_disk = np.zeros(len(ids), bool)
            on_disk[whole] = places.tiers[blocks[whole]] == Numbers.of(device=False).disk
            assert np.all(
                (places.tiers == Numbers.of(device=False).disk) | (places.tiers == Numbers.of(device=False).host)
            )
            wanted |= {(store.file.path, int(places.slots[block])) for block in blocks[on_disk]}
            self.host_nbytes += int((~on_disk).sum()) * TOKEN_NBYTES // HEADS
        self.wanted.append(wanted)


@pytest.mark.parametrize("name", ["window", "random", "quest", "landmark", "h2o", "snapkv", "sentencekv", "alisa"])
def test_what_nobody_wants_is_not_read(
    name: str, model: Any, caches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = inputs()["input_ids"]
    cache = caches(model, f"{name}:{SMALL[:-1]}1000")
    steps(model, cache, ids, [150, 150, TOKENS - NEW - 300])
    before = cache.statistics()
    spy = Spy(cache, name, monkeypatch)
    steps(model, cache, ids[:, -1:], [1])  # the first step is compared with all, and reads that
    spy.read.clear()
    spy.wanted.clear()
    spy.host_nbytes = 0
    first = cache.statistics()
    assert first.chosen.compared_steps == 2
    assert first.chosen.compared_nbytes > 0
    steps(model, cache, ids[:, -NEW:], [1] * (NEW - 1))
    after = cache.statistics()
    wanted = [place for places in spy.wanted for place in places]
    assert spy.read == set(wanted)
    assert after.read_nbytes - first.read_nbytes == len(wanted) * BLOCK * TOKEN_NBYTES
    assert after.chosen.read_nbytes - first.chosen.read_nbytes == len(wanted) * BLOCK * TOKEN_NBYTES
    assert after.chosen.gathered_nbytes - first.chosen.gathered_nbytes == spy.host_nbytes
    assert after.chosen.steps - first.chosen.steps == 2 * (NEW - 1)
    whole = 2 * TOKEN_NBYTES * sum(TOKENS - NEW + 2 + step for step in range(NEW - 1))
    assert after.chosen.whole_nbytes - first.chosen.whole_nbytes == whole
    assert before.chosen.steps == 0
    if name == "window":
        assert not wanted, "what was written last is in host memory"


def test_attention_that_was_kept_is_that_of_full_weights(caches: Callable[..., Any]) -> None:
    single = known(llama(1))
    ids = inputs()["input_ids"]
    cache = caches(single, f"window:{SMALL}")
    steps(single, cache, ids, [TOKENS - NEW] + [1] * NEW)
    single.set_attn_implementation("eager")
    with torch.no_grad():
        weights = single(input_ids=ids, output_attentions=True).attentions[0][0]
    kept = []
    for at in range(TOKENS - NEW, TOKENS):
        row = weights[:, at]
        kept.append(row[:, :4].sum(dim=1) + row[:, at + 1 - 156 : at + 1].sum(dim=1))
    found = cache.statistics().chosen
    assert found.compared_steps == NEW
    assert found.recall == pytest.approx(float(torch.stack(kept).mean()), abs=1e-4)
    assert found.least_recall == pytest.approx(float(torch.stack(kept).min()), abs=1e-4)


def test_the_oracle_keeps_more_than_chance(model: Any, caches: Callable[..., Any]) -> None:
    of = {}
    for name in ("random", "oracle", "sparq", "quest"):
        cache = caches(model, f"{name}:{SMALL}")
        steps(model, cache, inputs()["input_ids"], [TOKENS - NEW] + [1] * NEW)
        of[name] = cache.statistics().chosen.recall
    assert of["random"] < of["sparq"] <= of["oracle"] + 0.01
    assert of["quest"] <= of["oracle"] + 0.01


def test_a_second_question_finds_what_the_first_left_out(model: Any, caches: Callable[..., Any]) -> None:
    """What comes later as a prompt attends to all: nothing was deleted."""
    ids = inputs()["input_ids"]
    cache = caches(model, "window:40,recent=8,dense=1")
    exact = caches(model, "exact")
    pieces = [TOKENS - 60, 1, 50]
    got, expected = steps(model, cache, ids, pieces), steps(model, exact, ids, pieces)
    assert float((got[1] - expected[1]).abs().max()) > 1e-4
    # of layer 0 keys and values are those of attention to all; of layer 1 the one token's are, too, since layer 0 is
    # dense. So a prompt that attends to all gives the same.
    assert float((got[2] - expected[2]).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["quest", "landmark", "sparq", "snapkv", "sentencekv", "sale"])
def test_a_crop_leaves_what_a_shorter_context_would_have(name: str, model: Any, caches: Callable[..., Any]) -> None:
    ids = inputs()["input_ids"]
    cache, fresh = (caches(model, f"{name}:{SMALL}") for _ in range(2))
    steps(model, cache, ids, [TOKENS])
    cache.crop(-150)
    got = steps(model, cache, ids[:, 20:], [9, 1, 1])
    expected = steps(model, fresh, torch.cat([ids[:, : TOKENS - 150], ids[:, 20:]], dim=1), [TOKENS - 150, 9, 1, 1])
    if name != "sale":  # whose estimates choose for the whole of a prompt at once
        assert max(float((a - b).abs().max()) for a, b in zip(got, expected[1:], strict=True)) <= 1e-5
    cache.reset()
    again = steps(model, cache, ids, [TOKENS - 1, 1])
    fresh.reset()
    expected = steps(model, fresh, ids, [TOKENS - 1, 1])
    assert max(float((a - b).abs().max()) for a, b in zip(again, expected, strict=True)) <= 1e-5


def test_sparse_prompts_read_less(model: Any, caches: Callable[..., Any]) -> None:
    cache = caches(model, f"sale:{SMALL[:-1]}1000")
    steps(model, cache, inputs()["input_ids"], [100] * 7)
    chosen = cache.statistics().chosen
    assert chosen.steps == 14
    assert 0 < chosen.gathered_nbytes + chosen.read_nbytes < chosen.whole_nbytes


def test_a_long_prompt_is_not_gathered_whole(
    model: Any, caches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What some queries after another want is gathered together, up to twice the budget."""
    gathered, gather = [], StoredRow.gather

    def gathering(row: Any, ids: Any, *, values: bool = True) -> Any:
        if values:
            gathered.append(max(map(len, ids)))
        return gather(row, ids, values=values)

    monkeypatch.setattr(StoredRow, "gather", gathering)
    steps(model, caches(model, f"sale:{SMALL[:-1]}1000"), inputs()["input_ids"], [TOKENS])
    assert max(gathered) <= 2 * 160
    assert 2 < len(gathered) < 2 * -(-TOKENS // 64)


def test_policies_that_read_all_keys_take_no_disk(model: Any, tmp_path: Path) -> None:
    for name in READ_ALL:
        with pytest.raises(penstock.UsageError, match='give "disk": 0'):
            Cache(model, tmp_path, host="1MiB", disk="1MiB", policy=name)


def test_layers_that_choose_have_half_of_the_ring(caches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What dense layers read ahead does not take all buffers from those between them."""
    deep, ids = known(llama(4)), inputs()["input_ids"]
    free, some = [], ReadAhead.some

    def reading(ring: Any, *args: Any) -> Any:
        free.append((len(ring._free), len(ring._runs)))
        return some(ring, *args)

    monkeypatch.setattr(ReadAhead, "some", reading)
    cache = caches(deep, "random:160,recent=8,dense=2,recall=1000", host="256KiB")
    steps(deep, cache, ids, [TOKENS - NEW] + [1] * NEW)
    assert sum(runs > 0 for _, runs in free) >= NEW, "something was read ahead"
    assert all(empty >= (empty + runs) // 2 for empty, runs in free)


def test_a_refused_copy_of_rows_changes_no_layer(model: Any, caches: Callable[..., Any]) -> None:
    """Not the first one either, which attends to all and could."""
    ids = inputs()["input_ids"]
    cache = caches(model, "quest:160,recent=8,dense=1")
    steps(model, cache, ids, [40])
    for refused in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.reorder_cache(torch.tensor([0, 0])),
        lambda: cache.batch_select_indices(torch.tensor([0, 0])),
    ):
        with pytest.raises(penstock.UsageError, match="num_beams=1"):
            refused()
    got = steps(model, cache, ids[:, 40:], [1])
    assert float((got[0] - steps(model, None, ids, [41])[0][:, -1:]).abs().max()) <= 1e-5


def test_the_command_line_knows_how_a_model_attends_before_its_prompt() -> None:
    """Else policies that choose by votes would hear of the second call first."""
    unknown = llama(2)
    unknown.penstock = SimpleNamespace(device=None)
    option = KvOption(host=2**20, disk=0, choice=read_policy("snapkv:160,dense=0"))
    with closing(make_cache(unknown, option, None, "cpu", None)) as cache:
        assert cache.attends_in_blocks
        steps(unknown, cache, inputs()["input_ids"], [200, 1])
        assert cache.statistics().chosen.steps == 2


def test_rows_may_leave_and_may_not_become_two(model: Any, caches: Callable[..., Any]) -> None:
    asked = inputs(2, padding=7)
    cache = caches(model, f"quest:{SMALL}", host="256KiB")
    with pytest.raises(penstock.UsageError, match="num_beams=1"):
        generate(model, asked, past_key_values=cache, num_beams=2)
    cache.reset()
    alone = caches(model, f"quest:{SMALL}")
    ids = asked["input_ids"]
    steps(model, cache, ids, [TOKENS - 1])
    cache.batch_select_indices(torch.tensor([1]))
    got = steps(model, cache, ids[1:, -1:], [1])
    expected = steps(model, alone, ids[1:], [TOKENS - 1, 1])
    assert float((got[0] - expected[1]).abs().max()) <= 1e-5


def test_models_that_do_not_let_it_choose_are_told(caches: Callable[..., Any], model: Any) -> None:
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()
    with pytest.raises(penstock.UsageError, match='policy="exact"'):
        generate(
            t5, {"input_ids": torch.tensor([[5, 6]])}, past_key_values=caches(t5, "window:100,dense=0", host="1MiB")
        )
    other = llama(1)
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(penstock.UsageError, match='attn_implementation="sdpa"'):
        caches(other, "window:100")
    with pytest.raises(penstock.UsageError, match="of the blocks of 32 tokens"):
        caches(model, "quest:100")


def test_keys_that_came_before_are_caught_up_with(caches: Callable[..., Any]) -> None:
    """A model's first call is its own, and what a prefix store gives passes no attention: policies read it then."""
    unknown = llama(2)
    ids = inputs()["input_ids"]
    cache = caches(unknown, f"quest:{SMALL}")
    got = steps(unknown, cache, ids, [TOKENS - 3, 1, 1, 1])
    fresh = caches(unknown, f"quest:{SMALL}")
    expected = steps(unknown, fresh, ids, [TOKENS - 3, 1, 1, 1])
    assert cache.statistics().chosen.steps == 4
    assert fresh.statistics().chosen.steps == 6
    assert float((got[0] - expected[0]).abs().max()) <= 1e-5
