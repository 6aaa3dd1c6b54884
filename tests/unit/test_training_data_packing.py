"""Packing, splitting and shuffling against slow, obvious references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.runtime.training.data.order import epoch_order, split
from penstock.runtime.training.data.packing import CutPacking, Packing, WholePacking

lengths = st.lists(st.integers(1, 30), min_size=0, max_size=40)


def flattened(packing: Packing) -> list[list[tuple[int, int]]]:
    """By sequence, (document, token) of each token."""
    return [
        [(piece.document, token) for piece in packing.pieces(index) for token in range(piece.begin, piece.end)]
        for index in range(len(packing))
    ]


def numbered(count: int) -> np.ndarray:
    return 3 * np.arange(count, dtype=np.int64) + 1


@given(lengths, st.integers(2, 20))
def test_texts_are_cut_every_seq_tokens(of: list[int], seq: int) -> None:
    documents = numbered(len(of))
    stream = [(int(document), token) for document, length in zip(documents, of, strict=True) for token in range(length)]
    expected = [stream[at : at + seq] for at in range(0, len(stream), seq)]
    if expected and len(expected[-1]) == 1:
        expected.pop()  # a single token predicts nothing
    assert flattened(CutPacking(documents, np.array(of, np.int64), seq=seq)) == expected


def naive_best_fit(of: list[int], seq: int) -> list[int]:
    """Tokens in each sequence."""
    loads: list[int] = []
    for length in sorted(of, reverse=True):
        fitting = [at for at, load in enumerate(loads) if load + length <= seq]
        if fitting:
            fullest = max(fitting, key=lambda at: loads[at])
            loads[fullest] += length
        else:
            loads.append(length)
    return sorted(loads)


@given(lengths, st.integers(30, 70))
def test_conversations_stay_whole_and_fill_sequences_as_best_fit_does(of: list[int], seq: int) -> None:
    documents = numbered(len(of))
    packing = WholePacking(documents, np.array(of, np.int64), seq=seq)
    found = flattened(packing)
    assert sorted(len(sequence) for sequence in found) == naive_best_fit(of, seq)
    placed = sorted(token for sequence in found for token in sequence)
    assert placed == [(int(d), token) for d, length in zip(documents, of, strict=True) for token in range(length)]
    for index in range(len(packing)):
        pieces = packing.pieces(index)
        assert [piece.document for piece in pieces] == sorted(piece.document for piece in pieces)
        assert all(piece.begin == 0 for piece in pieces)


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_the_split_is_disjoint_and_complete(count: int, fraction: float, seed: int) -> None:
    train, aside = split(count, fraction=fraction, seed=seed)
    assert sorted([*train.tolist(), *aside.tolist()]) == list(range(count))
    assert train.tolist() == sorted(train.tolist())
    assert aside.tolist() == sorted(aside.tolist())
    assert len(aside) == min(max(round(count * fraction), 1), count - 1)
    again = split(count, fraction=fraction, seed=seed)
    assert again[1].tolist() == aside.tolist()


def test_splits_that_have_no_meaning() -> None:
    train, aside = split(5, fraction=0, seed=0)
    assert (train.tolist(), aside.tolist()) == ([0, 1, 2, 3, 4], [])
    with pytest.raises(UsageError, match="there is 1: give more documents"):
        split(1, fraction=0.1, seed=0)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="has no meaning"):
            split(5, fraction=fraction, seed=0)


@given(st.integers(0, 200), st.integers(0, 2**70), st.integers(0, 1000))
def test_an_epoch_has_every_sequence_once(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == epoch_order(count, seed=seed, epoch=epoch).tolist()


def test_orders_differ_and_stay_the_same_from_version_to_version() -> None:
    orders = [tuple(epoch_order(8, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders[0] == (7, 4, 5, 1, 6, 2, 0, 3)  # a run that is resumed with another numpy goes on in the same order
    assert split(8, fraction=0.25, seed=0)[1].tolist() == [2, 3]
    with pytest.raises(UsageError, match="seed=-1"):
        epoch_order(3, seed=-1, epoch=0)
