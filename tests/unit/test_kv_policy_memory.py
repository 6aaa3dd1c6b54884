"""What policies of selection hold, and look at at once, does not grow with calls or with a prompt's keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from kv_selections import FP32, HEADS, SETTING, TOKENS, prepared, some_keys, some_query

from penstock.scheduler.kv.arraykeys import ArrayKeys
from penstock.scheduler.kv.policies import policy, sale
from penstock.scheduler.kv.policies.alisa import Alisa
from penstock.scheduler.kv.policies.policy import FloatArray, IntArray, Seen
from penstock.scheduler.kv.policies.sale import restored
from penstock.scheduler.kv.policies.sentences import Sentences


def test_alisa_keeps_no_record_of_each_query() -> None:
    setting = replace(SETTING, budget_tokens=2048)
    made = policy("alisa", HEADS, setting, layer=5)
    assert isinstance(made, Alisa)
    made.appended(np.zeros((2, 3000, HEADS.dim), np.float32))
    ids: IntArray = np.arange(2048)
    for _ in range(1100):
        made.attended(Seen(tokens=(ids,) * 2, mass=(np.ones(2048, np.float32),) * 2))
    assert len(made._older) < 8
    held = sum(sums.nbytes for _, sums in made._older)
    assert held + made._newest._held.nbytes + made._sums._held.nbytes <= 11 * 2 * 3000 * FP32
    assert made._sums.values[:, :2048].tolist() == [[7 * 128 + 1100 % 128] * 2048] * 2
    assert not made._sums.values[:, 2048:].any()


def test_sentences_are_closed_while_a_prompt_comes() -> None:
    """Keys of a long prompt are not held: at most what came last, and a sentence."""
    keys = some_keys()
    made, at_once = (policy("sentencekv", HEADS, SETTING, layer=5) for _ in range(2))
    assert isinstance(made, Sentences)
    for at in range(0, TOKENS, 7):
        made.appended(keys[:, at : at + 7])
        assert made._tail.shape[1] < 7 + SETTING.block_tokens
    at_once.appended(keys)
    found, expected = (one.select(some_query(), ArrayKeys(HEADS, keys)) for one in (made, at_once))
    assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in expected.ids]


def test_sale_looks_at_a_piece_of_keys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = some_keys() * 3, some_query()
    whole = prepared("sale", keys).select(query, ArrayKeys(HEADS, keys))
    looked: list[int] = []

    def look(codes: npt.NDArray[np.uint8], scales: FloatArray, dim: int) -> FloatArray:
        looked.append(codes.shape[1])
        return restored(codes, scales, dim)

    monkeypatch.setattr(sale, "restored", look)
    monkeypatch.setattr(sale, "LOOK_TOKENS", 20)
    pieces = prepared("sale", keys).select(query, ArrayKeys(HEADS, keys))
    assert looked == [16] * 12 + [11]
    assert [ids.tolist() for ids in pieces.ids] == [ids.tolist() for ids in whole.ids]
    assert pieces.scored_nbytes == whole.scored_nbytes
