"""`penstock prof stats`: the figures of a profile in the terminal."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from ..options import Json
from ..output import Output
from .inputs import File, read
from .overview import overview
from .tables import category_tables, has_room, link_table, module_table, widen


class By(StrEnum):
    """What to list in full, in place of the overview."""

    MODULE = "module"
    CATEGORY = "category"
    LINK = "link"


def stats(
    file: File,
    by: Annotated[By | None, typer.Option("--by", help="List one thing in full, instead of the overview.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows of a list.")] = 10,
    as_json: Json = False,
) -> None:
    """Tell what a run came to: what binds, where the time went, who held the memory.

    With --json everything there is, in bytes, nanoseconds and shares of 1.
    """
    output = Output()
    profile, summary = read(file, output)
    if as_json:
        output.write_json(_document(profile, summary))
        return
    widen(output.data)
    if by is By.MODULE:
        output.data.print(module_table(summary, top, wide=has_room(output.data)))
    elif by is By.CATEGORY:
        for table in category_tables(summary, top):
            output.data.print(table)
    elif by is By.LINK:
        output.data.print(link_table(summary))
    else:
        for part in overview(profile, summary, top, wide=has_room(output.data)):
            output.data.print(part)


def _document(profile: Any, summary: Any) -> dict[str, object]:
    import msgspec

    return {
        "summary": msgspec.to_builtins(summary),
        "header": msgspec.to_builtins(profile.header),
        "footer": msgspec.to_builtins(profile.footer),
        "problems": list(profile.problems),
    }
