"""Cutting a long text into pieces that are tokenized one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

PIECE_CHARACTERS: Final = 2**18


def cut(pieces: Iterable[str], *, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The same text in pieces of at most `characters`, none of them empty.

    A piece ends behind a line end if it can, else before a space, else in the middle of what has neither. Tokenizers
    split text at these places anyway, so that the tokens are those of the whole text with few exceptions: one that
    puts a space before every text puts one before every piece.
    """
    held = ""
    for piece in pieces:
        held += piece
        begin = 0
        while len(held) - begin > characters:
            end = _end(held, begin, begin + characters)
            yield held[begin:end]
            begin = end
        held = held[begin:]
    if held:
        yield held


def _end(text: str, begin: int, limit: int) -> int:
    """Where a piece from `begin` ends, at `limit` or before."""
    line = text.rfind("\n", begin, limit)
    while line > begin:
        if not text[line + 1].isspace():  # a run of line ends is one token to many tokenizers
            return line + 1
        line = text.rfind("\n", begin, line)
    at = limit
    while at > begin + 1 and not (text[at].isspace() and not text[at - 1].isspace()):
        at -= 1
    return at if at > begin + 1 else limit
