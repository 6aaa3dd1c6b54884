"""Rows to tokens, and which of them are to be learnt."""

from __future__ import annotations

from typing import Any

import pytest
from training_data_files import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    FORGETFUL,
    MARKED,
    PAD,
    PLAIN,
    SYSTEM,
    USER,
    ids,
    letter_tokenizer,
    turn,
    word_tokenizer,
    words,
)

from penstock.memory.errors import CheckpointError, UsageError
from penstock.runtime.training.data.encoding import Encoder
from penstock.runtime.training.data.fingerprint import tokenizer_fingerprint
from penstock.runtime.training.data.rows import ChatRow, PairRow


def conversation(*turns: tuple[str, str]) -> ChatRow:
    return ChatRow(messages=tuple(turn(role, content) for role, content in turns))


def test_begin_and_end_of_text_are_the_tokenizers() -> None:
    encoder = Encoder(word_tokenizer())
    assert (encoder.before.tolist(), encoder.after.tolist(), encoder.pad) == ([BOS], [EOS], PAD)
    assert [found.tolist() for found in encoder.texts([words(3, 4), words(5)])] == [ids(3, 4), ids(5)]
    assert Encoder(word_tokenizer(bos=False)).before.tolist() == []
    assert Encoder(word_tokenizer(), eos=False).after.tolist() == []
    without = Encoder(letter_tokenizer())
    assert (without.before.tolist(), without.after.tolist(), without.pad) == ([], [], 0)


def test_an_end_that_the_tokenizer_writes_is_not_written_twice() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    encoder = Encoder(tokenizer)
    assert (encoder.before.tolist(), encoder.after.tolist()) == ([BOS], [EOS])


def test_all_ids_are_below_the_vocabulary_whatever_the_tokenizer_counts() -> None:
    assert Encoder(word_tokenizer(words=50)).vocabulary == 58


def test_a_response_is_learnt_and_its_prompt_is_not() -> None:
    found = Encoder(word_tokenizer()).pair(PairRow(prompt=words(1, 2) + " ", response=words(3, 4)))
    assert found.ids.tolist() == [BOS, *ids(1, 2, 3, 4), EOS]
    assert found.loss.tolist() == [False, False, False, True, True, True]


def test_a_token_over_the_border_is_not_made() -> None:
    found = Encoder(letter_tokenizer()).pair(PairRow(prompt="ca", response="bab"))
    assert found.ids.tolist() == [3, 1, 2, 8]  # c, a | b, ab: together it would be c, ab, ab
    assert found.loss.tolist() == [False, False, True, True]


def test_the_first_token_is_never_learnt() -> None:
    found = Encoder(word_tokenizer(bos=False)).pair(PairRow(prompt=" ", response=words(3, 4)))
    assert found.loss.tolist() == [False, True, True]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_learnt(template: str) -> None:
    row = conversation(
        ("system", words(1)),
        ("user", words(2)),
        ("assistant", words(3, 4)),
        ("user", words(5)),
        ("assistant", words(6)),
    )
    found = Encoder(word_tokenizer(template=template)).conversation(row)
    expected = [
        *((BOS, 0), (SYSTEM, 0), (*ids(1), 0), (END, 0), (USER, 0), (*ids(2), 0), (END, 0), (ASSISTANT, 0)),
        *((ids(3)[0], 1), (ids(4)[0], 1), (END, 1), (USER, 0), (*ids(5), 0), (END, 0), (ASSISTANT, 0)),
        *((*ids(6), 1), (END, 1)),
    ]
    assert found.ids.tolist() == [token for token, _ in expected]
    assert found.loss.tolist() == [bool(learnt) for _, learnt in expected]


def test_a_template_with_marks_may_begin_with_the_assistant() -> None:
    row = conversation(("assistant", words(1)), ("user", words(2)))
    found = Encoder(word_tokenizer(template=MARKED)).conversation(row)
    assert found.loss.tolist() == [False, False, True, True, False, False, False]
    with pytest.raises(UsageError, match="it begins with the assistant"):
        Encoder(word_tokenizer(template=PLAIN)).conversation(row)


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does() -> None:
    encoder = Encoder(word_tokenizer(template=FORGETFUL))
    once = encoder.conversation(conversation(("user", words(1)), ("assistant", words(2))))
    assert once.loss.tolist() == [False, False, False, False, True, True]
    with pytest.raises(UsageError, match="the conversation up to message 2 has tokens that are no beginning"):
        encoder.conversation(
            conversation(("user", words(1)), ("assistant", words(2)), ("user", words(3)), ("assistant", words(4)))
        )


def test_marks_that_run_on_are_refused() -> None:
    # The last character within the mark is a space, of which this tokenizer makes nothing.
    template = MARKED.replace(
        "{{ message.content }}<|end|>{% endgeneration %}", "{{ message.content }} {% endgeneration %}<|end|>"
    )
    row = conversation(("user", words(1)), ("assistant", words(2)), ("user", words(3)))
    with pytest.raises(UsageError, match="marks go on behind"):
        Encoder(word_tokenizer(template=template)).conversation(row)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template fails over it .*roles must alternate"),
        ("{{ messages[0].content }}", "leaves no token to the assistant"),
        ("<|user|>{% generation %}{% endgeneration %}", "leaves no token to the assistant"),
        ("{{ messages[0].nothing.more }}", "the chat template fails over it"),
    ],
)
def test_templates_that_fail(template: str | None, message: str) -> None:
    row = conversation(("user", words(1)), ("assistant", words(2)))
    with pytest.raises(UsageError, match=message):
        Encoder(word_tokenizer(template=template)).conversation(row)


def test_tools_reach_the_template() -> None:
    template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + PLAIN
    row = ChatRow(messages=(turn("user", words(1)), turn("assistant", words(2))), tools=({"name": words(9)},))
    assert Encoder(word_tokenizer(template=template)).conversation(row).ids.tolist()[0] == ids(9)[0]


class Wrapped:
    """A tokenizer some of whose answers are others."""

    def __init__(self, tokenizer: Any, **answers: Any) -> None:
        self._tokenizer = tokenizer
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        return self._answers[name] if name in self._answers else getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return self._answers.get("length", len(self._tokenizer))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._answers.get("call", self._tokenizer)(*args, **options)


def test_marks_are_of_no_use_to_a_slow_tokenizer() -> None:
    row = conversation(("user", words(1)), ("assistant", words(2, 3)), ("user", words(4)), ("assistant", words(5)))
    fast = word_tokenizer(template=MARKED)
    found = [Encoder(each).conversation(row) for each in (fast, Wrapped(fast, is_fast=False))]
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].loss.tolist() == found[1].loss.tolist()


def test_a_tokenizer_that_lies_or_fails() -> None:
    liar = Wrapped(word_tokenizer(), length=3, get_vocab=lambda: {"a": 2})
    with pytest.raises(CheckpointError, match="writes the id 11 and names 3 tokens"):
        Encoder(liar).texts([words(3)])

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of\norder")

    with pytest.raises(CheckpointError, match=r"tokenizer fails \(RuntimeError: out of order\)"):
        Encoder(Wrapped(word_tokenizer(), call=fail))
    with pytest.raises(CheckpointError, match="makes nothing that can be followed"):
        Encoder(Wrapped(word_tokenizer(), call=lambda *args, **options: {"input_ids": [[]]}))


def test_a_tokenizer_without_end_of_text_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    Encoder(letter_tokenizer(), eos=False)
    assert not caplog.text
    Encoder(letter_tokenizer())
    assert "has no end of text" in caplog.text


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    same, again = word_tokenizer(template=PLAIN), word_tokenizer(template=PLAIN)
    again("some text", truncation=True, max_length=2)  # leaves its mark on the object
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(again)
    others: list[Any] = [
        word_tokenizer(template=MARKED),
        word_tokenizer(template=PLAIN, bos=False),
        word_tokenizer(words=51),
    ]
    others += [letter_tokenizer(), Wrapped(same, is_fast=False)]
    assert len({tokenizer_fingerprint(each) for each in (same, *others)}) == 6
