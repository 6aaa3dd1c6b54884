"""Text of a profile made fit for a terminal: its names are somebody else's."""

from __future__ import annotations


def plain(text: str) -> str:
    """The same text with � for everything that does not print: control sequences, line ends, halves of characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)
