"""Keys and values in buffers that are made once, against transformers' own cache that grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from penstock.runtime import caches
from penstock.runtime.reserved import ReservedLayer, reserved_cache

HEADS, SIZE = 2, 4

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 5)),
        st.tuples(st.just("crop"), st.integers(1, 4)),
        st.tuples(st.just("select"), st.integers(0, 2**16)),
        st.tuples(st.just("reorder"), st.integers(0, 2**16)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("move"), st.just(0)),
    ),
    max_size=12,
)


@given(steps=STEPS, tokens=st.integers(1, 20), rows=st.integers(1, 3))
def test_whatever_happens_to_it_it_holds_what_a_growing_one_holds(
    steps: list[tuple[str, int]], tokens: int, rows: int
) -> None:
    mine, other = ReservedLayer(tokens), DynamicLayer()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    cache.layers = [mine]
    assert caches.can_move(cache, {0})
    for what, number in [("update", 2), *steps]:
        if what == "update":
            new = [torch.randn(rows, HEADS, number, SIZE, generator=generator) for _ in range(2)]
            returned, expected = mine.update(*new), other.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(returned, expected, strict=True))
        elif what == "crop" and number < other.get_seq_length():
            mine.crop(-number), other.crop(-number)
        elif what in ("select", "reorder") and other.get_seq_length():
            chosen = torch.tensor([(number >> shift) % rows for shift in range(1 if what == "select" else rows)])
            for layer in (mine, other):
                layer.batch_select_indices(chosen) if what == "select" else layer.reorder_cache(chosen)
            rows = len(chosen)
        elif what == "repeat" and other.get_seq_length() and rows < 8:
            mine.batch_repeat_interleave(number), other.batch_repeat_interleave(number)
            rows *= number
        elif what == "move":  # to the other memory, where its lanes are computed from now on
            caches.move(cache, {0}, torch.clone)
        elif what == "reset":
            mine.reset(), other.reset()
        assert mine.get_seq_length() == other.get_seq_length()
        if other.get_seq_length():
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)


def test_what_was_reserved_is_not_copied_again() -> None:
    layer = ReservedLayer(64)
    places = set()
    for _ in range(64):
        keys, values = layer.update(*(torch.ones(3, HEADS, 1, SIZE) for _ in range(2)))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    assert keys.untyped_storage().nbytes() == 3 * HEADS * 64 * SIZE * 4


def test_rows_that_leave_give_their_memory_back() -> None:
    layer = ReservedLayer(16)
    one: Any = [torch.ones(4, HEADS, 3, SIZE) for _ in range(2)]
    layer.update(*one)
    layer.batch_select_indices(torch.tensor([1]))
    keys, _ = layer.update(*(each[:1] for each in one))
    assert keys.untyped_storage().nbytes() == 1 * HEADS * 16 * SIZE * 4


@pytest.mark.parametrize("window", [None, 8])
def test_a_cache_has_them_where_transformers_has_plain_layers(window: int | None) -> None:
    types = ["full_attention", "sliding_attention" if window else "full_attention"]
    config = LlamaConfig(num_hidden_layers=2, layer_types=types, sliding_window=window)
    cache = reserved_cache(config, 10)
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [
        ReservedLayer, DynamicSlidingWindowLayer if window else ReservedLayer,
    ]  # fmt: skip
