"""Rows to token ids, and which of them there is loss on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ....memory.errors import CheckpointError, UsageError
from .conversation import encode_conversation
from .rows import ChatRow, PairRow

logger = logging.getLogger(__name__)

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

_PROBES: Final = ("a", "the", "0", "x y")
"""Texts of which a tokenizer makes at least one token, most likely."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A document's tokens."""

    ids: Ids
    """[tokens]"""
    loss: Flags
    """[tokens], True where the token is to be learnt. The first never is: nothing precedes it."""


class Encoder:
    """A tokenizer as training uses it: what it puts before and after a text, and an end of text after each document.

    Args:
        tokenizer: One of transformers'.
        eos: Whether a text, and a response, is followed by the tokenizer's end of text, where it has one and does not
            write it by itself. What ends a conversation is the chat template's.

    Raises:
        CheckpointError: the tokenizer fails over the simplest text.
    """

    def __init__(self, tokenizer: Any, *, eos: bool = True) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab().values()
        self.vocabulary = max(len(tokenizer), max(ids, default=0) + 1)
        """All ids are below this."""
        before, after = self._surroundings()
        end = tokenizer.eos_token_id
        if eos and end is None:
            logger.warning("the tokenizer has no end of text: texts and responses follow each other without one")
        elif eos and after[-1:] != [end]:
            after = [*after, end]
        self.before: Ids = np.array(before, np.int64)
        """What comes before each document that is no conversation: most often a begin of text."""
        self.after: Ids = np.array(after, np.int64)
        """What comes after it."""
        pad = tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else end if end is not None else 0)
        """What fills up a sequence. There is no loss on it, and nothing before it sees it."""

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, with nothing before and after it.

        Raises:
            CheckpointError: the tokenizer fails, or writes ids that its vocabulary has not.
        """
        found = self._encode(list(texts), special=False)
        return [self._checked(ids) for ids in found]

    def pair(self, row: PairRow) -> Encoded:
        """A prompt and its response as one document, with loss on the response and what ends it.

        Prompt and response are tokenized together where the tokens of the prompt are then those that it has by itself,
        which is what the model is given when it is asked; else apart.
        """
        together, prompt = self.texts([row.prompt + row.response, row.prompt])
        if len(together) > len(prompt) and np.array_equal(together[: len(prompt)], prompt):
            response = together[len(prompt) :]
        else:
            (response,) = self.texts([row.response])
        if not len(response):
            raise UsageError('the tokenizer makes no tokens of "response": remove the row')
        ids = np.concatenate((self.before, prompt, response, self.after))
        loss = np.arange(len(ids)) >= max(len(self.before) + len(prompt), 1)
        return Encoded(ids=ids, loss=loss)

    def conversation(self, row: ChatRow) -> Encoded:
        """A conversation as one document, with loss on the assistant's turns.

        Raises:
            UsageError: the chat template refuses it, or its turns cannot be told apart.
        """
        ids, spans = encode_conversation(self._tokenizer, row)
        checked = self._checked(ids)
        loss = np.zeros(len(checked), bool)
        for begin, end in spans:
            loss[begin:end] = True
        loss[:1] = False
        if not loss.any():
            raise UsageError("the chat template leaves no token to the assistant: remove the row, or mend the template")
        return Encoded(ids=checked, loss=loss)

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        try:
            found: list[list[int]] = self._tokenizer(
                texts,
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        except Exception as error:  # each kind of tokenizer fails in its own way
            raise CheckpointError(
                f"the checkpoint's tokenizer fails ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                "look at its files, or at the text"
            ) from error
        return found

    def _checked(self, ids: Sequence[int]) -> Ids:
        found = np.array(ids, np.int64)
        if len(found) and not (found.min() >= 0 and found.max() < self.vocabulary):
            raise CheckpointError(
                f"the checkpoint's tokenizer writes the id {found.max()} and names {self.vocabulary} tokens only: "
                "its files disagree, fetch them again"
            )
        return found

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text of its own accord."""
        for probe in _PROBES:
            (bare,), (full,) = self._encode([probe], special=False), self._encode([probe], special=True)
            for begin in range(len(full) - len(bare) + 1):
                if bare and full[begin : begin + len(bare)] == bare:
                    return list(full[:begin]), list(full[begin + len(bare) :])
        raise CheckpointError(
            f"the checkpoint's tokenizer makes nothing that can be followed of {', '.join(map(repr, _PROBES))}: "
            "look at its files"
        )
