"""A file of prompts: one JSON value per line, checked line by line before anything slow is imported."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..budget import parse_budget
from ..memory.errors import UsageError
from .request import Prompt, Sampling

_KEYS: Final = ("prompt", "ids", "max_new_tokens", "id")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLine:
    """One prompt of the file."""

    line: int
    """Where it stands, counted from 1."""
    text: str | None
    ids: tuple[int, ...] | None
    """One of the two."""
    max_new_tokens: int | None
    """None for what the command line says."""
    id: str | int | None
    """The user's own name for it, which comes back with the result."""

    def prompt(self, *, chat: bool) -> Prompt:
        """The same as `penstock run` has it for one prompt."""
        return Prompt(text=self.text, ids=self.ids, chat=chat and self.ids is None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ManyRequest:
    """One `penstock run --prompts`."""

    checkpoint: str
    """A folder or a Hub id."""
    file: Path
    """The prompts; "-" is stdin."""
    output: Path | None
    """None is stdout."""
    resume: bool
    force: bool
    chat: bool
    max_new_tokens: int
    sampling: Sampling
    max_memory: str
    device: str
    disk: Path | None
    dtype: str
    trust_remote_code: bool
    as_json: bool

    def __post_init__(self) -> None:
        parse_budget(self.max_memory)
        if self.output is None and (self.resume or self.force):
            raise UsageError("--resume and --force are about the file of results: name it by --output")
        if self.resume and self.force:
            raise UsageError("--resume goes on with a file and --force writes it anew: give one of them")
        if self.output is None and self.as_json:
            raise UsageError("--json prints a summary where the results would go: name a file for them by --output")


def read_prompts(file: Path) -> list[PromptLine]:
    """The prompts of a file. Empty lines are skipped.

    A line is a text in quotes, or an object: {"prompt": "a text"} or {"ids": [1, 2]}, with "max_new_tokens" and "id" if
    wanted.

    Raises:
        UsageError: the file cannot be read, has no prompt, or a line of it is none; the message names the line.
    """
    found = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_parse(number, json.loads(line)))
        except RecursionError as error:
            raise UsageError(f"{file}, line {number}: nested too deeply to be a prompt") from error
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{file}, line {number}: not JSON ({error.msg} at column {error.colno}); write one prompt per line, "
                f'as "a text" in quotes or {{"prompt": "a text"}}'
            ) from error
        except UsageError as error:
            raise UsageError(f"{file}, line {number}: {error}") from error
        except ValueError as error:  # a number of thousands of digits
            raise UsageError(f"{file}, line {number}: not JSON that can be read ({error})") from error
    if not found:
        raise UsageError(f"{file} has no prompts: give at least one line")
    return found


def digest(lines: Sequence[PromptLine], request: ManyRequest) -> str:
    """What tells these prompts under these settings from others: 64 hexadecimal digits."""
    prompts = [[line.text, line.ids, line.max_new_tokens, line.id] for line in lines]
    settings = [request.checkpoint, request.max_new_tokens, asdict(request.sampling), request.chat, request.dtype]
    return hashlib.sha256(json.dumps([prompts, settings]).encode()).hexdigest()


def _read(file: Path) -> str:
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompts {file} cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{file}, line {line}: not UTF-8 text; convert the file") from error


def _parse(number: int, value: Any) -> PromptLine:
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise UsageError(f'a prompt is a text in quotes or an object such as {{"prompt": "a text"}}, not {value!r:.40}')
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    text, ids, count, name = (value.get(key) for key in _KEYS)
    if (text is None) == (ids is None):
        raise UsageError('give one of "prompt" and "ids"')
    if text is not None and not isinstance(text, str):
        raise UsageError(f'"prompt" is a text, not {text!r:.40}')
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError('"prompt" has half a surrogate pair, which is no character')
    if ids is not None and not (isinstance(ids, list) and ids and all(_is_count(token) for token in ids)):
        raise UsageError('"ids" is a list of token ids, at least one')
    if count is not None and not (_is_count(count) and count > 0):
        raise UsageError(f'"max_new_tokens" is a number from 1, not {count!r:.40}')
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise UsageError(f'"id" is a text or a number, not {name!r:.40}')
    return PromptLine(line=number, text=text, ids=None if ids is None else tuple(ids), max_new_tokens=count, id=name)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
