"""Keys and values in blocks against plain tensors: whatever is appended, cropped and reordered, under small budgets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from penstock.kernels import attention_partial
from penstock.memory.errors import DoesNotFitError, PenstockError, UsageError
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.runtime.kv.attention import Asked, attend
from penstock.runtime.kv.memory import KvBudget
from penstock.runtime.kv.spread import Use, spans
from penstock.runtime.kv.tiers import KvTiers

PAGE = 4096
HEADS, DIM, VALUE_DIM, SIZE = 2, 16, 16, 8
"""A block is half a page."""
LAYERS = 2


@pytest.fixture
def tiers_of(tmp_path: Path) -> Iterator[Callable[..., KvTiers]]:
    made = []

    def make(
        *, host_slots: int = 14, disk_slots: int = 400, size: int = SIZE, device_slots: int | None = None
    ) -> KvTiers:
        host = (LAYERS * host_slots + 4) * PAGE * 8 // 7 // PAGE * PAGE
        there = 0 if device_slots is None else max(16, (LAYERS * device_slots + 2) * 8 // 7) * PAGE
        budget = KvBudget(host=max(host, 32 * PAGE), disk=LAYERS * disk_slots * PAGE, device=there)
        device = None if device_slots is None else EmulatedDevice(Rates(h2d=1e9, d2h=1e9))
        made.append(KvTiers(budget, layers=LAYERS, folder=str(tmp_path), block_tokens=size, device=device, owned=True))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


class Plain:
    """The same, as tensors."""

    def __init__(self, rows: int, paddings: list[int]) -> None:
        self.keys = torch.zeros(rows, HEADS, 0, DIM)
        self.values = torch.zeros(rows, HEADS, 0, VALUE_DIM)
        self.paddings = paddings

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = self.keys.shape[2]
        keys, values = keys.clone(), values.clone()
        for row, padding in enumerate(self.paddings):  # nothing is kept of it
            keys[row, :, : max(0, padding - before)] = 0
            values[row, :, : max(0, padding - before)] = 0
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)

    def reorder(self, rows: list[int]) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.paddings = [self.paddings[row] for row in rows]

    def crop(self, tokens: int) -> None:
        if tokens < self.keys.shape[2]:  # what was padding there may come as tokens
            self.paddings = [min(padding, tokens) for padding in self.paddings]
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]

    def attention(self, query: torch.Tensor, new: int) -> torch.Tensor:
        """Of the last `new` tokens: [rows, new, heads, dim]; 0 where padding asks."""
        heads = query.shape[1]
        tokens = self.keys.shape[2]
        at = torch.arange(tokens)
        seen = at <= torch.arange(tokens - new, tokens)[:, None]
        mask = seen[None] & (at >= torch.tensor(self.paddings)[:, None, None])
        group = heads // HEADS
        out, _ = attention_partial.reference(
            query,
            self.keys.repeat_interleave(group, 1),
            self.values.repeat_interleave(group, 1),
            scale=0.3,
            mask=mask[:, None],
        )
        return out.transpose(1, 2)


def random_tokens(draw: torch.Generator, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(rows, HEADS, count, DIM, generator=draw),
        torch.randn(rows, HEADS, count, VALUE_DIM, generator=draw),
    )


@pytest.mark.parametrize("seed", range(18))
def test_any_order_of_what_can_happen(tiers_of: Callable[..., KvTiers], seed: int) -> None:
    choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = choose.choice([1, 1, 2, 4])
    paddings = [choose.choice([0, 0, 3, 11]) for _ in range(rows)]
    tiers = tiers_of(
        host_slots=choose.choice([10, 16, 40]),
        size=choose.choice([1, 4, SIZE]),
        device_slots=choose.choice([6, 12, 40]) if seed % 2 else None,
    )
    plain = [Plain(rows, list(paddings)) for _ in range(LAYERS)]
    tiers.pad(paddings)
    for _ in range(40):
        what = choose.random()
        if what < 0.7:
            count = choose.choice([1, 1, 1, 5, 30])
            for layer in range(LAYERS):
                keys, values = random_tokens(draw, rows, count)
                query = torch.randn(rows, 2 * HEADS, count, DIM, generator=draw)
                before = plain[layer].keys.shape[2]
                asked = Asked(
                    query=query,
                    keys=keys,
                    values=values,
                    scale=0.3,
                    paddings=tiers.paddings_of(layer, rows),
                    before=before,
                )
                out = attend(asked, tiers.reader.blocks(layer, queries=2 * count))
                tiers.append(layer, keys, values)
                plain[layer].append(keys, values)
                torch.testing.assert_close(out, plain[layer].attention(query, count), atol=2e-6, rtol=1e-5)
        elif what < 0.85:
            keep = choose.randrange(plain[0].keys.shape[2] + 1)
            for layer in range(LAYERS):
                tiers.crop(layer, keep)
                plain[layer].crop(keep)
        elif plain[0].keys.shape[2]:
            order = [choose.randrange(rows) for _ in range(choose.choice([rows, rows, 1, 3]))]
            for layer in range(LAYERS):
                tiers.reorder(layer, order)
                plain[layer].reorder(order)
            rows = len(order)
        if choose.random() < 0.3 and tiers.store(0) is not None:
            for layer in range(LAYERS):
                keys, values = tiers.reader.whole(layer)
                assert torch.equal(keys, plain[layer].keys)
                assert torch.equal(values, plain[layer].values)
    figures = tiers.statistics()
    assert figures.host_nbytes <= figures.arena_nbytes <= figures.host_budget_nbytes
    assert figures.device_nbytes <= figures.device_budget_nbytes


def test_much_was_on_disk_in_those(tiers_of: Callable[..., KvTiers]) -> None:
    tiers, draw = tiers_of(host_slots=10), torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        tiers.append(layer, *random_tokens(draw, 1, 300))
    figures = tiers.statistics()
    assert figures.disk_nbytes > 1.5 * figures.host_nbytes
    assert figures.written_nbytes == figures.disk_nbytes


def test_explicit_masks_are_cut_to_blocks(tiers_of: Callable[..., KvTiers]) -> None:
    tiers, draw = tiers_of(host_slots=10), torch.Generator().manual_seed(0)
    plain = Plain(2, [0, 0])
    for count in (100, 4):
        keys, values = random_tokens(draw, 2, count)
        query = torch.randn(2, 2 * HEADS, count, DIM, generator=draw)
        before = plain.keys.shape[2]
        for heads in (1, 2 * HEADS):
            mask = torch.rand(2, heads, count, before + count, generator=draw) < 0.5
            asked = Asked(query=query, keys=keys, values=values, scale=0.3, mask=mask, paddings=(0, 0), before=before)
            out = attend(asked, tiers.reader.blocks(0))
            all_keys, all_values = torch.cat([plain.keys, keys], 2), torch.cat([plain.values, values], 2)
            expected, _ = attention_partial.reference(
                query, all_keys.repeat_interleave(2, 1), all_values.repeat_interleave(2, 1), scale=0.3, mask=mask
            )
            torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
        tiers.append(0, keys, values)
        plain.append(keys, values)


def test_sinks_take_a_part_of_the_attention(tiers_of: Callable[..., KvTiers]) -> None:
    tiers, draw = tiers_of(), torch.Generator().manual_seed(0)
    old, new = random_tokens(draw, 1, 20), random_tokens(draw, 1, 1)
    tiers.append(0, *old)
    query, sinks = torch.randn(1, 4, 1, DIM, generator=draw), torch.tensor([0.5, -1.0, 2.0, float("-inf")])
    asked = Asked(query=query, keys=new[0], values=new[1], scale=0.3, sinks=sinks, paddings=(0,), before=20)
    keys, values = (torch.cat([a, b], 2).repeat_interleave(2, 1) for a, b in zip(old, new, strict=True))
    scores = torch.cat([query @ keys.transpose(2, 3) * 0.3, sinks.view(1, 4, 1, 1)], dim=3)
    expected = scores.softmax(dim=3)[..., :-1] @ values
    torch.testing.assert_close(attend(asked, tiers.reader.blocks(0)), expected.transpose(1, 2), atol=2e-6, rtol=1e-5)


def test_other_tokens_than_the_layer_has_are_refused(tiers_of: Callable[..., KvTiers]) -> None:
    tiers, draw = tiers_of(), torch.Generator().manual_seed(0)
    tiers.append(0, *random_tokens(draw, 1, 2))
    with pytest.raises(UsageError, match="reset the cache"):
        tiers.append(0, *random_tokens(draw, 2, 2))
    keys, values = random_tokens(draw, 1, 2)
    with pytest.raises(UsageError, match="float32 and values"):
        tiers.append(1, keys, values.half())


def test_a_call_that_did_not_end_is_found_out(tiers_of: Callable[..., KvTiers]) -> None:
    tiers, draw = tiers_of(), torch.Generator().manual_seed(0)
    tiers.append(0, *random_tokens(draw, 1, 2))
    tiers.require_in_step(1, 2)
    with pytest.raises(PenstockError, match="interrupted by an error"):
        tiers.require_in_step(1, 1)
    with pytest.raises(ZeroDivisionError), tiers.in_whole():
        _ = 1 // 0
    with pytest.raises(PenstockError, match="interrupted by an error"):
        tiers.require_in_step(0, 1)
    tiers.reset(0)
    tiers.require_in_step(0, 1)


def test_a_ring_that_is_too_small_is_said(tmp_path: Path) -> None:
    tiers = KvTiers(KvBudget(host=16 * PAGE, disk=2**20), layers=1, folder=str(tmp_path), block_tokens=SIZE)
    draw = torch.Generator().manual_seed(0)
    with pytest.raises(DoesNotFitError, match=r"need 131072 bytes .* an eighth for reads of 4 blocks") as told:
        tiers.append(0, *random_tokens(draw, 1, SIZE))
    assert (told.value.needed_nbytes, told.value.available_nbytes) == (32 * PAGE, 16 * PAGE)
    tiers.close()


def test_spans_are_of_blocks_with_as_many_rows() -> None:
    uses = [[Use(row=0, position=0)], [Use(row=0, position=8)], [], [Use(row=1, position=0), Use(row=2, position=0)]]
    made = spans(uses)
    assert [(span.first, span.count, span.rows.tolist(), span.alike) for span in made] == [
        (0, 2, [[0], [0]], (0,)),
        (3, 1, [[1, 2]], (1, 2)),
    ]
