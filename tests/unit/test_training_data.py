"""Training data as a whole: from a file to batches, and on from every position."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data_files import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    FIRST_WORD,
    MARKED,
    PAD,
    USER,
    ids,
    letter_tokenizer,
    turn,
    word_tokenizer,
    words,
    write_rows,
)
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.memory.errors import DiskError, UsageError
from penstock.runtime.training.data.batches import Batch
from penstock.runtime.training.data.dataset import DataOptions, TrainingData, open_data
from penstock.runtime.training.data.position import Position
from penstock.runtime.training.data.sequences import DataStatistics, Sequences

TOKENIZER = word_tokenizer(template=MARKED)


def texts(tmp_path: Path, lengths: list[int], **options: Any) -> TrainingData:
    """Document d is a text of the word w(d), so many times."""
    rows = [{"text": words(*[number] * length)} for number, length in enumerate(lengths)]
    path = write_rows(tmp_path / "texts.jsonl", rows)
    os.utime(path, ns=(1, 1))
    return open_data(path, TOKENIZER, folder=tmp_path / "run", options=DataOptions(**options))


def same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("input_ids", "labels", "position_ids", "documents")
    ) and (left.tokens, left.loss_tokens) == (right.tokens, right.loss_tokens)


def rows_of(sequences: Sequences) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    found = [sequences[index] for index in range(len(sequences))]
    return [
        (each.input_ids.tolist(), each.labels.tolist(), each.position_ids.tolist(), each.documents.tolist())
        for each in found
    ]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(2, 12))
def test_texts_are_concatenated_and_cut(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq: int) -> None:
    data = texts(tmp_path_factory.mktemp("data"), lengths, seq=seq)
    stream = []
    for document, length in enumerate(lengths):
        stream += [(token, document) for token in (BOS, *ids(*[document] * length), EOS)]
    expected = []
    for at in range(0, len(stream), seq):
        window = stream[at : at + seq]
        if len(window) == 1:
            break
        positions: list[int] = []
        for here, (_, document) in enumerate(window):
            positions.append(positions[-1] + 1 if here and window[here - 1][1] == document else 0)
        padding = seq - len(window)
        expected.append(
            (
                [token for token, _ in window] + [PAD] * padding,
                [token for token, _ in window] + [-100] * padding,
                positions + list(range(padding)),
                [document for _, document in window] + [-1] * padding,
            )
        )
    assert rows_of(data.training) == expected
    counted = data.training.statistics
    assert counted == DataStatistics(
        documents=len(lengths),
        tokens=sum(document != -1 for row in expected for document in row[3]),
        loss_tokens=sum(label != -100 for row in expected for label in row[1][1:]),
        sequences=len(expected),
        padding=sum(document == -1 for row in expected for document in row[3]),
        truncated=0,
        left_out=0,
    )


def chats(tmp_path: Path, lengths: list[int], **options: Any) -> TrainingData:
    """Document d is a question of one word, and an answer of so many words w(d): 6 tokens and so many."""
    rows = [
        {"messages": [turn("user", words(49)), turn("assistant", words(*[number] * length))]}
        for number, length in enumerate(lengths)
    ]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    return open_data(path, TOKENIZER, folder=tmp_path / "run", options=DataOptions(**options))


def test_conversations_stay_whole(tmp_path: Path) -> None:
    data = chats(tmp_path, [2, 5, 1], seq=16)  # 8, 11 and 7 tokens
    opened = [BOS, USER, *ids(49), END, ASSISTANT]
    assert sorted(rows_of(data.training)) == sorted(
        [
            (
                [*opened, *ids(1, 1, 1, 1, 1), END] + [PAD] * 5,
                [-100] * 5 + [*ids(1, 1, 1, 1, 1), END] + [-100] * 5,
                [*range(11), *range(5)],
                [1] * 11 + [-1] * 5,
            ),
            (
                [*opened, *ids(0, 0), END, *opened, *ids(2), END, PAD],
                [-100] * 5 + [*ids(0, 0), END] + [-100] * 5 + [*ids(2), END] + [-100],
                [*range(8), *range(7), 0],
                [0] * 8 + [2] * 7 + [-1],
            ),
        ]
    )
    assert data.training.statistics == DataStatistics(
        documents=3, tokens=26, loss_tokens=11, sequences=2, padding=6, truncated=0, left_out=0
    )
    assert data.largest_id == FIRST_WORD + 49


def test_what_is_too_long(tmp_path: Path) -> None:
    lengths = [1, 9, 2]  # 7, 15 and 8 tokens
    truncated = chats(tmp_path, lengths, seq=8)
    assert truncated.training.statistics == DataStatistics(
        documents=3, tokens=23, loss_tokens=2 + 3 + 3, sequences=3, padding=1, truncated=1, left_out=0
    )
    assert all(len(set(row[3]) - {-1}) == 1 for row in rows_of(truncated.training))
    without = chats(tmp_path, lengths, seq=8, too_long="leave-out").training
    assert without.statistics == DataStatistics(
        documents=2, tokens=15, loss_tokens=5, sequences=2, padding=1, truncated=0, left_out=1
    )
    assert {number for row in rows_of(without) for number in row[3]} == {-1, 0, 2}
    with pytest.raises(UsageError, match="1 of 3 rows have more tokens than seq=8, the longest, at 2, 15"):
        chats(tmp_path, lengths, seq=8, too_long="refuse")
    # Of the longest only the question fits, of which nothing is learnt.
    with pytest.raises(UsageError, match="leaves nothing to train on: of 3 documents 0 are for evaluation and 3"):
        chats(tmp_path, lengths, seq=5)
    assert chats(tmp_path, lengths, seq=6).training.statistics.loss_tokens == 3


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=10),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
    whole=st.booleans(),
)
def test_no_document_is_in_both_sides(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], fraction: float, seed: int, whole: bool
) -> None:
    make = chats if whole else texts
    data = make(tmp_path_factory.mktemp("data"), lengths, seq=16, eval_fraction=fraction, seed=seed)
    assert data.evaluation is not None
    sides = [{number for row in rows_of(side) for number in row[3]} - {-1} for side in (data.training, data.evaluation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(len(lengths)))
    for side, numbers in zip((data.training, data.evaluation), sides, strict=True):
        assert side.statistics.documents == len(numbers)
        tokens = sum(lengths[number] + (6 if whole else 2) for number in numbers)
        alone = not whole and tokens % 16 == 1
        assert side.statistics.tokens == tokens - alone
    given_out = list(data.evaluation_batches(batch=2))
    assert sum(len(batch.input_ids) for batch in given_out) == len(data.evaluation)
    assert sum(batch.loss_tokens for batch in given_out) == data.evaluation.statistics.loss_tokens


def test_batches_are_full_and_every_epoch_has_each_sequence_once(tmp_path: Path) -> None:
    data = texts(tmp_path, [7, 3, 8, 2, 9, 4], seq=8, seed=3)
    count = len(data.training)
    assert count == 6
    batches = data.batches(batch=4, accumulate=3)
    seen = [row.tolist() for _ in range(5) for batch in batches.step() for row in batch.input_ids]
    everything = sorted(row[0] for row in rows_of(data.training))
    assert len(seen) == 60
    epochs = [seen[begin : begin + count] for begin in range(0, 60, count)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 1
    assert batches.position.batches == 15
    assert batches.position.tokens == 10 * data.training.statistics.tokens
    assert batches.position.loss_tokens == 10 * data.training.statistics.loss_tokens
    assert (batches.position.epoch, batches.position.index) == (10, 0)
    assert [batches.steps(epochs) for epochs in (0.1, 1, 2, 2.5)] == [1, 1, 1, 2]
    assert data.batches(batch=1).steps(1.5) == 9


def test_batches_as_a_model_takes_them(tmp_path: Path) -> None:
    batch = next(texts(tmp_path, [7, 3], seq=8).batches(batch=2))
    inputs = batch.inputs()
    assert inputs.pop("use_cache") is False
    assert list(inputs) == ["input_ids", "labels", "position_ids"]
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 8) for tensor in inputs.values())
    assert "position_ids" not in batch.inputs(positions=False)


@pytest.mark.parametrize(("batch", "then"), [(1, 1), (2, 2), (5, 5), (3, 2)])
def test_from_every_position_the_rest_is_the_same(tmp_path: Path, batch: int, then: int) -> None:
    lengths = [7, 3, 8, 2, 9, 4]
    data = texts(tmp_path, lengths, seq=8, eval_fraction=0.2, seed=5)
    count = 3 * len(data.training)
    straight = data.batches(batch=1)
    rows = [next(straight) for _ in range(count + 8)]
    batches = data.batches(batch=batch)
    for _ in range(count // batch):
        kept = json.loads(json.dumps(batches.position.to_json()))
        again = texts(tmp_path, lengths, seq=8, eval_fraction=0.2, seed=5)
        resumed = again.batches(batch=then, position=Position.from_json(kept))
        at = batches.position.batches * batch
        following = next(resumed)
        assert following.input_ids.tolist() == [rows[at + each].input_ids[0].tolist() for each in range(then)]
        taken = next(batches)
        if then == batch:
            assert same(following, taken)
            assert resumed.position == batches.position


def test_a_position_of_other_data_is_refused(tmp_path: Path) -> None:
    lengths = [7, 3, 8]
    kept = texts(tmp_path, lengths, seq=8).batches(batch=1).position
    for options, message in (
        ({"seq": 9}, "seq was 8 and is 9"),
        ({"seq": 8, "seed": 1}, "seed was 0 and is 1"),
        ({"seq": 8, "eval_fraction": 0.5}, "eval_fraction was 0.0 and is 0.5"),
    ):
        with pytest.raises(UsageError, match=message):
            texts(tmp_path, lengths, **options).batches(batch=1, position=kept)
    with pytest.raises(UsageError, match="the source file, or the tokenizer, is another"):
        texts(tmp_path, [7, 3, 9], seq=8).batches(batch=1, position=kept)


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"identity": {}}, {"epoch": 0}, "identity", {"identity": None}],
)
def test_positions_that_are_none(value: Any) -> None:
    with pytest.raises(UsageError, match="no position in the data"):
        Position.from_json(value)


@pytest.mark.parametrize("count", [-1, 1.5, "1", True, None])
def test_positions_with_counts_that_are_none(tmp_path: Path, count: Any) -> None:
    kept = texts(tmp_path, [7], seq=8).batches(batch=1).position.to_json()
    assert Position.from_json(kept)
    with pytest.raises(UsageError, match="no position in the data"):
        Position.from_json({**kept, "index": count})


def test_a_position_behind_its_epoch_is_refused(tmp_path: Path) -> None:
    data = texts(tmp_path, [7], seq=8)
    with pytest.raises(UsageError, match="the position is at sequence 99 of an epoch that has 1"):
        data.batches(batch=1, position=Position(identity=data.identity, index=99))


@pytest.mark.parametrize(
    "options", [{"seq": 1}, {"seq": 8, "eval_fraction": 1}, {"seq": 8, "seed": -1}, {"seq": 8, "too_long": "cut"}]
)
def test_options_that_have_no_meaning(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no meaning"):
        DataOptions(**options)


def test_numbers_of_batches_that_have_no_meaning(tmp_path: Path) -> None:
    data = texts(tmp_path, [7, 3], seq=8, eval_fraction=0.5)
    for options in ({"batch": 0}, {"batch": 1, "accumulate": 0}):
        with pytest.raises(UsageError, match="has no meaning"):
            data.batches(**options)
    with pytest.raises(UsageError, match="batch=0"):
        list(data.evaluation_batches(batch=0))
    with pytest.raises(IndexError):
        data.training[len(data.training)]


def test_a_single_text_has_no_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(words(1, 2, 3))
    with pytest.raises(UsageError, match="there is 1"):
        open_data(path, TOKENIZER, folder=tmp_path, options=DataOptions(seq=4, eval_fraction=0.1))
    data = open_data(path, TOKENIZER, folder=tmp_path, options=DataOptions(seq=4))
    assert data.evaluation is None
    assert list(data.evaluation_batches(batch=1)) == []
    assert data.training.statistics.sequences == 1, "the fifth token would be alone"


def test_nothing_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a")
    with pytest.raises(UsageError, match="leaves nothing to train on"):
        open_data(path, letter_tokenizer(), folder=tmp_path, options=DataOptions(seq=4))


def test_damaged_tokens_are_not_trained_on(tmp_path: Path) -> None:
    data = texts(tmp_path, [7, 3], seq=8)
    kept = tmp_path / "run" / "data.tokens"
    good = kept.read_bytes()
    content = bytearray(good)
    content[64 + 3] ^= 0x80
    kept.write_bytes(content)
    again = texts(tmp_path, [7, 3], seq=8)  # it is noticed, and they are made again
    assert kept.read_bytes() == good
    assert again.identity == data.identity
    with kept.open("r+b") as file:  # behind the back of who has it mapped
        file.seek(64 + 3)
        file.write(bytes([good[64 + 3] ^ 0x80]))
    with pytest.raises(DiskError, match="is damaged in sequence 0"):
        again.training[0]
    assert len(data.training) == 2


def test_a_last_token_alone_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"text": words(1, 2, 3)}, {"text": words(4, 5, 6)}, {"text": words(7)}])
    tokenizer = word_tokenizer(bos=False, eos=False)
    data = open_data(path, tokenizer, folder=tmp_path, options=DataOptions(seq=3))
    assert data.training.statistics == DataStatistics(
        documents=2, tokens=6, loss_tokens=4, sequences=2, padding=0, truncated=0, left_out=1
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_positions_keep_documents_apart_in_a_model(tmp_path: Path, attention: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    batch = next(chats(tmp_path, [2, 3, 4, 5], seq=24).batches(batch=2))
    with torch.no_grad():
        packed = model(**batch.inputs()).logits
        for row in range(2):
            for document in set(batch.documents[row].tolist()) - {-1}:
                mine = batch.documents[row] == document
                alone = model(input_ids=batch.input_ids[row, mine][None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, mine], alone)
        together = model(**batch.inputs(positions=False)).logits
    assert not torch.allclose(together, packed)
