"""One row of training data, checked: a text, a prompt with its response, or a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ....memory.errors import UsageError

Kind = Literal["text", "response", "messages"]
"""What all rows of a file hold: loss is on the whole text, on the response, or on the assistant's turns."""

KEYS: Final = ("text", "prompt", "response", "messages", "tools")
"""What is read of a row. Rows often carry more (an id, a source, a score): that is left alone."""

_SHAPES: Final = '{"text": …}, {"prompt": …, "response": …} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRow:
    """A text to be learnt as a whole."""

    pieces: Iterable[str]
    """The text in order, so that a book need not be in memory at once. Gone through once."""
    kind: Kind = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """A prompt and the response to be learnt."""

    prompt: str
    response: str
    kind: Kind = "response"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRow:
    """A conversation whose assistant turns are to be learnt."""

    messages: tuple[dict[str, Any], ...]
    """What the chat template gets, keys whose value is null left out."""
    tools: tuple[dict[str, Any], ...] | None = None
    """Descriptions of functions, for templates that know of them."""
    kind: Kind = "messages"


Row = TextRow | PairRow | ChatRow


def parse_row(value: object) -> Row:
    """The row that a JSON value is. A key whose value is null counts as absent.

    Raises:
        UsageError: it is none; the message says what is wrong and what to change, not where it stands.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"a row is an object such as {_SHAPES}, not {_shown(value)}")
    given = {key: value[key] for key in KEYS if value.get(key) is not None}
    _check_characters(given)
    shapes = [
        name
        for name, keys in (
            ('"text"', ("text",)),
            ('"prompt" and "response"', ("prompt", "response")),
            ('"messages"', ("messages",)),
        )
        if any(key in given for key in keys)
    ]
    if len(shapes) > 1:
        raise UsageError(f"it has {' as well as '.join(shapes)}: keep one of them, so that it is clear what to learn")
    if not shapes:
        there = ", ".join(repr(str(key)[:40]) for key in list(value)[:8]) or "no keys"
        raise UsageError(f"nothing to learn in it ({there}): write {_SHAPES}")
    if "text" in given:
        return TextRow(pieces=(_text(given, "text"),))
    if "messages" in given:
        return _chat(given)
    for key in ("prompt", "response"):
        if key not in given:
            raise UsageError(f'"{key}" is missing: give both "prompt" and "response", or "text" alone')
    return PairRow(prompt=_text(given, "prompt"), response=_text(given, "response"))


def _text(given: Mapping[str, object], key: str) -> str:
    text = given[key]
    if not isinstance(text, str):
        raise UsageError(f'"{key}" is a text in quotes, not {_shown(text)}')
    if not text.strip():
        raise UsageError(f'"{key}" is empty: remove the row, or fill it')
    return text


def _chat(given: Mapping[str, object]) -> ChatRow:
    messages = given["messages"]
    if not isinstance(messages, list):
        raise UsageError(f'"messages" is a list of {{"role": …, "content": …}}, not {_shown(messages)}')
    if not messages:
        raise UsageError('"messages" is empty: remove the row, or fill it')
    checked = tuple(_message(number, message) for number, message in enumerate(messages, 1))
    if not any(message["role"] == "assistant" for message in checked):
        raise UsageError('no message has the role "assistant", so there is nothing to learn: remove the row')
    tools = given.get("tools")
    if tools is None:
        return ChatRow(messages=checked)
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f'"tools" is a list of objects that describe functions, not {_shown(tools)}')
    return ChatRow(messages=checked, tools=tuple(tools) or None)


def _message(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f'message {number} is no {{"role": …, "content": …}} but {_shown(message)}')
    kept = {str(key): value for key, value in message.items() if value is not None}
    role, content = kept.get("role"), kept.get("content")
    if not (isinstance(role, str) and role):
        raise UsageError(f'message {number}: "role" is a word such as "user" or "assistant", not {_shown(role)}')
    calls = bool(kept.get("tool_calls"))
    if not isinstance(content, str) and not (content is None and calls):
        raise UsageError(f'message {number}: "content" is a text in quotes, not {_shown(content)}')
    if role == "assistant" and not calls and not (content or "").strip():
        raise UsageError(f'message {number}: the assistant\'s "content" is empty: remove the message, or fill it')
    return kept


def _check_characters(value: object) -> None:
    """Refuse what JSON can write and no text can hold, before a tokenizer fails over it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{value[error.start : error.start + 1]!a} is half a surrogate pair, which is no character: remove it"
            ) from error
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_characters(key)
            _check_characters(item)
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)


def _shown(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.40}"
