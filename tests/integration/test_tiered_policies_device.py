"""Policies of selection beside a device: what they choose is attended to where it lies, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tiered_policies import BLOCK, HEADS, LOSSY, READ_ALL, SMALL, generate, inputs, known, llama, steps

import penstock
from penstock.runtime.kv.stored import StoredRow

LINK = "emulated:h2d=256MiB/s,d2h=256MiB/s"
CHOOSING = [name for name in LOSSY if name not in READ_ALL]
TOKENS, NEW = 1000, 5
PIECES = [300, TOKENS - NEW - 300] + [1] * NEW
IDS = torch.randint(1, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
TIERS = {"device": "64KiB", "host": "128KiB", "disk": "16MiB"}
"""Of 31 blocks of a page in each layer, 7 are on the device, 14 in host memory and the others on disk."""


@pytest.fixture(scope="module")
def model() -> Any:
    return known(llama(2))


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(model: Any, policy: str, *, where: str = LINK, **budget: Any) -> Any:
        cache = penstock.TieredCache(
            model.config, max_memory=budget, block_tokens=BLOCK, disk=tmp_path, policy=policy, device=where
        )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def apart(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_chosen_gives_the_same_wherever_it_lies(name: str, model: Any, caches: Callable[..., Any]) -> None:
    plain = caches(model, f"{name}:{SMALL}", host="1MiB", disk=0)
    cache = caches(model, f"{name}:{SMALL}", **TIERS)
    expected, got = steps(model, plain, IDS, PIECES), steps(model, cache, IDS, PIECES)
    assert apart(got, expected) <= 1e-5
    figures, other = cache.statistics(), plain.statistics()
    assert min(figures.device_nbytes, figures.host_nbytes, figures.disk_nbytes) > 0
    assert figures.chosen.recall == pytest.approx(other.chosen.recall, abs=1e-5)
    assert figures.chosen.scored_nbytes == other.chosen.scored_nbytes


@pytest.mark.parametrize("name", ["quest", "h2o", "window"])
def test_nothing_that_is_chosen_crosses_to_the_device(name: str, model: Any, caches: Callable[..., Any]) -> None:
    cache = caches(model, f"{name}:{SMALL[:-1]}1000", **TIERS)  # the first step alone is compared with all
    steps(model, cache, IDS, PIECES[:3])
    before = cache.statistics()
    steps(model, cache, IDS[:, -NEW:], PIECES[3:])
    after = cache.statistics()
    assert after.fetched_nbytes == before.fetched_nbytes
    token_nbytes = 2 * HEADS * 8 * 4  # keys and values, in fp32
    told = (NEW - 1) * 2 * token_nbytes // 2  # policies hear of each new key, in both layers
    slots = 2 * 4096  # a block may have had to leave in either layer
    assert after.sent_nbytes - before.sent_nbytes <= told + slots


def test_rows_of_their_own_lengths_crops_and_turns(model: Any, caches: Callable[..., Any]) -> None:
    asked = inputs(2, padding=7)
    expected = generate(model, asked)
    cache = caches(model, "quest:1000,dense=0,recall=1", device="256KiB", host="256KiB", disk="16MiB")
    got = generate(model, asked, past_key_values=cache, prefill_chunk_size=150)
    assert torch.equal(got.sequences, expected.sequences)
    assert apart(list(got.logits), list(expected.logits)) <= 1e-5
    one, other = (caches(model, f"landmark:{SMALL}", **budget) for budget in (TIERS, {"host": "1MiB", "disk": 0}))
    for each in (one, other):
        steps(model, each, IDS, PIECES[:3])
        each.crop(-390)  # into a block that has left the device
    assert apart(steps(model, one, IDS[:, 20:], [9, 1, 1]), steps(model, other, IDS[:, 20:], [9, 1, 1])) <= 1e-5


def test_tokens_are_gathered_where_they_lie(model: Any, caches: Callable[..., Any]) -> None:
    cache = caches(model, f"quest:{SMALL}", **TIERS)
    steps(model, cache, IDS, PIECES[:3])
    whole = [part[0] for part in cache.tiers.reader.whole(1)]
    row: StoredRow = cache.tiers.reader.row(1, 0)
    draw = np.random.default_rng(0)
    for count in (1, 40, row.tokens):
        wanted = [np.sort(draw.choice(row.tokens, size=max(1, count - head), replace=False)) for head in range(HEADS)]
        here, there = row.split(wanted)
        for head in range(HEADS):
            assert np.array_equal(np.union1d(here[head], there[head]), wanted[head])
        gatherings = [(wanted, row.gather(wanted)), (here, row.gather(here))]
        if any(map(len, there)):
            gatherings.append((there, row.gather_there(there)))
        for some, found in gatherings:
            for head, tokens in enumerate(some):
                for part, all_of_it in zip(found, whole, strict=True):
                    assert torch.equal(part[head, : len(tokens)].cpu(), all_of_it[head, torch.from_numpy(tokens)])
                    assert not part[head, len(tokens) :].any(), "what is beyond a head's own is 0, and never NaN"
        for head in range(HEADS):
            keys = torch.from_numpy(row.rows(head, wanted[head]))
            assert torch.equal(keys, whole[0][head, torch.from_numpy(wanted[head])])
    assert row.split([np.arange(row.tokens)] * HEADS)[1][0][-1] == row.tokens - 1, "blocks grow on the device"


def test_policies_that_read_all_keys_take_no_device(model: Any, caches: Callable[..., Any]) -> None:
    for name in READ_ALL:
        with pytest.raises(penstock.UsageError, match="leave device= out"):
            caches(model, f"{name}:160", device="1MiB", host="1MiB", disk=0)
