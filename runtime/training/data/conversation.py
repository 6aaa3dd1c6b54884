"""A conversation through the checkpoint's chat template: its tokens, and which spans of them the assistant said."""

from __future__ import annotations

import re
from typing import Any, Final

from ....memory.errors import UsageError
from .rows import ChatRow

Span = tuple[int, int]
"""From the first token of a turn to the one behind its last."""

_GENERATION: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_conversation(tokenizer: Any, row: ChatRow) -> tuple[list[int], list[Span]]:
    """The tokens of a conversation, and the spans to be learnt.

    A template that marks what the assistant says, by {% generation %}, is believed. Otherwise the conversation is
    rendered up to each turn of the assistant's, with what asks for a turn, and up to its end: the turn is the
    difference, provided that both are beginnings of the whole.

    Raises:
        UsageError: there is no template, it fails, or a part of the conversation is no beginning of the whole.
    """
    template = _template(tokenizer, row)
    if _GENERATION.search(template) and tokenizer.is_fast:  # only a fast one knows which token a character is in
        return _by_marks(tokenizer, row)
    return _by_beginnings(tokenizer, row)


def _template(tokenizer: Any, row: ChatRow) -> str:
    try:
        return str(tokenizer.get_chat_template(None, list(row.tools) if row.tools else None))
    except ValueError as error:
        raise UsageError(
            "the checkpoint has no chat template for it: give rows of prompt and response, or an instruction-tuned "
            "checkpoint"
        ) from error


def _by_marks(tokenizer: Any, row: ChatRow) -> tuple[list[int], list[Span]]:
    rendered = _render(tokenizer, row, len(row.messages), return_assistant_tokens_mask=True)
    ids, marks = list(rendered["input_ids"]), list(rendered["assistant_masks"])
    if marks and marks[-1] and row.messages[-1]["role"] != "assistant":
        # Where a tokenizer drops the last character of a turn, transformers marks everything up to the end.
        raise UsageError(
            "the chat template's {% generation %} marks go on behind the assistant's turn: end the mark before white "
            "space that the tokenizer drops"
        )
    return ids, _runs(marks)


def _by_beginnings(tokenizer: Any, row: ChatRow) -> tuple[list[int], list[Span]]:
    ids = _ids(tokenizer, row, len(row.messages))
    spans = []
    for number, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise UsageError(
                "it begins with the assistant, and what asks for that turn cannot be told from it: put a message of "
                "the user's or the system's before it"
            )
        asked = _ids(tokenizer, row, number, add_generation_prompt=True)
        said = _ids(tokenizer, row, number + 1)
        for part, what in ((asked, f"up to where message {number + 1} begins"), (said, f"up to message {number + 1}")):
            if ids[: len(part)] != part:
                raise UsageError(
                    f"which tokens are the assistant's cannot be told: the conversation {what} has tokens that are no "
                    "beginning of the whole one's, because the chat template writes earlier turns otherwise once "
                    "others follow. Give a checkpoint whose template has {% generation %}, or rows of prompt and "
                    "response"
                )
        spans.append((len(asked), len(said)))
    return ids, spans


def _ids(tokenizer: Any, row: ChatRow, count: int, **options: Any) -> list[int]:
    return list(_render(tokenizer, row, count, **options)["input_ids"])


def _render(tokenizer: Any, row: ChatRow, count: int, **options: Any) -> Any:
    """The first `count` messages."""
    try:
        return tokenizer.apply_chat_template(
            list(row.messages[:count]),
            tools=list(row.tools) if row.tools else None,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            **options,
        )
    except Exception as error:  # a template is a program of the checkpoint's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        part = "it" if count == len(row.messages) else f"its first {count} messages"
        raise UsageError(f"the chat template fails over {part} ({reason}): change the row as it says") from error


def _runs(marks: list[int]) -> list[Span]:
    """The runs of ones."""
    spans, begin = [], None
    for at, mark in enumerate([*marks, 0]):
        if mark and begin is None:
            begin = at
        elif not mark and begin is not None:
            spans.append((begin, at))
            begin = None
    return spans
