"""Tables as plain lines: the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text


def lines_of(rows: Sequence[Sequence[str]]) -> list[Text]:
    """Columns, the first to the left and the others to the right, under a heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(Text("  ".join(cells).rstrip(), style="cyan" if index == 0 else ""))
    return lines
