"""What a user asked of `penstock run`, checked before anything slow is imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..budget import parse_budget
from ..memory.errors import UsageError
from .kv_option import KvOption


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. Greedy where the temperature is None or zero."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.temperature is None and (self.top_p, self.top_k, self.seed) != (None, None, None):
            raise UsageError("--top-p, --top-k and --seed shape sampling, which --temperature switches on: add it")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return not self.temperature

    def options(self) -> dict[str, object]:
        """The arguments of transformers' `generate`. What a checkpoint suggests for sampling holds only there."""
        if self.greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, **{name: value for name, value in chosen.items() if value is not None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the model is to continue: a text or token ids, one of the two."""

    text: str | None
    ids: tuple[int, ...] | None
    chat: bool
    """Put the text into the checkpoint's chat template, as the user's first message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One `penstock run`."""

    checkpoint: str
    """A folder or a Hub id."""
    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling
    max_memory: str
    device: str
    disk: Path | None
    dtype: str
    trust_remote_code: bool
    as_json: bool
    plan: Path | None = None
    """Of a run; None to make one."""
    exact: bool = False
    context: int | None = None
    """Tokens to leave room for; None for those of the run."""
    kv: KvOption | None = None
    """Budgets of keys and values; None to have them in memory."""

    def __post_init__(self) -> None:
        parse_budget(self.max_memory)  # raises before the slow imports rather than after


def read_prompt(*, text: str | None, file: Path | None, ids: str | None, chat: bool) -> Prompt:
    """The prompt, from the one option that was given. The file "-" is stdin.

    Raises:
        UsageError: none or several were given, or it cannot be read, or is empty.
    """
    given = [name for name, value in (("--prompt", text), ("--prompt-file", file), ("--prompt-ids", ids)) if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: give one of them")
    if not given:
        raise UsageError(
            "there is nothing to continue: give a text that is not empty by --prompt or --prompt-file (- is stdin), or "
            "--prompt-ids 1,2,3"
        )
    if ids:
        if chat:
            raise UsageError("--chat puts a text into the chat template: give --prompt instead of --prompt-ids")
        return Prompt(text=None, ids=_parse_ids(ids), chat=False)
    if file is not None:
        text = _read_text(file)
        if not text:
            raise UsageError(f"--prompt-file {file} is empty: there is nothing to continue")
    return Prompt(text=text, ids=None, chat=chat)


def _parse_ids(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdecimal()):
            raise UsageError(f"--prompt-ids {text!r}: {part!r} is not a token id; write for example 1,15043,29892")
    return tuple(int(part) for part in parts)


def _read_text(file: Path) -> str:
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompt-file {file} cannot be read: {error.strerror}") from error
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {file} is not UTF-8 text (byte {error.start}): convert it") from error
