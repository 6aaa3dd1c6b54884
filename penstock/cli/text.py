"""Text to token ids and back: the checkpoint's tokenizer, and streamers that write tokens as they come."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..memory.errors import CheckpointError, UsageError
from .request import Prompt

_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.tiktoken", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json"),
)
"""Any of these means that a checkpoint has a tokenizer."""
_ENDS: Final = re.compile(r"""(?:[.!?…。！？][\"'’”»)\]\s]*|\n\s*)\Z""")


def find_tokenizer(folder: str, *, trust_remote_code: bool) -> Any | None:
    """The tokenizer of a checkpoint folder; None where it has none.

    Raises:
        CheckpointError: there is one, and it cannot be loaded.
    """
    if not any(os.path.exists(os.path.join(folder, name)) for name in _FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails in its own way
        hint = "" if trust_remote_code else ", or allow the checkpoint's own code by --trust-remote-code"
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({_one_line(error)}); install what it names{hint}"
        ) from error


def encode(prompt: Prompt, tokenizer: Any | None, checkpoint: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
        UsageError: it is a text and there is no tokenizer, or no chat template where one is asked for.
        CheckpointError: the chat template is broken.
    """
    if prompt.ids is not None:
        return list(prompt.ids)
    if tokenizer is None:
        raise UsageError(f"{checkpoint} has no tokenizer: give the prompt as token ids, for example --prompt-ids 1,2,3")
    if not prompt.chat:
        ids: list[int] = tokenizer(prompt.text)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise UsageError(f"{checkpoint} has no chat template: leave out --chat, or use an instruction-tuned model")
        message = [{"role": "user", "content": prompt.text}]
        try:
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # a template is a program of the checkpoint's
            raise CheckpointError(
                f"{checkpoint}: its chat template failed ({_one_line(error)}); leave out --chat and write the turns out"
            ) from error
    if not ids:
        raise UsageError("the prompt has no tokens: give a longer text")
    return list(ids)


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that end a sentence: with a full stop, a question or exclamation mark or a new line, also where
    quotes, brackets or spaces follow it."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
    return frozenset(token for token, text in zip(ids, texts, strict=True) if _ENDS.search(text))


class IdStreamer(BaseStreamer):
    """Writes token ids to stdout, with commas between them and a line end after them."""

    def __init__(self) -> None:
        self._comma = ""

    def put(self, value: Tensor) -> None:
        """Some more tokens."""
        for token in value.flatten().tolist():
            print(f"{self._comma}{token}", end="", file=sys.stdout, flush=True)
            self._comma = ","

    def end(self) -> None:
        """No more tokens."""
        print(file=sys.stdout, flush=True)


class Relay(BaseStreamer):
    """Passes new tokens on to a writer (None: nobody), after telling of each; keeps the prompt back.

    Args:
        on_token: Called for each new token before it is written.
    """

    def __init__(self, writer: BaseStreamer | None, on_token: Callable[[], None]) -> None:
        self._writer = writer
        self._on_token = on_token
        self._prompt_seen = False
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then tokens as they come (called by `generate`)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids.extend(value.flatten().tolist())
        self._on_token()
        if self._writer is not None:
            self._writer.put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """No more tokens (called by `generate`)."""
        if self._writer is not None:
            self._writer.end()  # type: ignore[no-untyped-call]


def writer_for(tokenizer: Any | None) -> BaseStreamer:
    """What writes to stdout: words where there is a tokenizer, ids elsewhere."""
    return IdStreamer() if tokenizer is None else TextStreamer(tokenizer, skip_special_tokens=True)


def decode(tokenizer: Any | None, ids: list[int]) -> str | None:
    """The text of new tokens; None without a tokenizer."""
    return None if tokenizer is None else str(tokenizer.decode(ids, skip_special_tokens=True))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
