"""`penstock prof diff`: two profiles side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...shares import parse_share
from ..options import Json
from ..output import Output
from .inputs import THRESHOLD_FAILED, read
from .tables import change_table, has_room, module_change_table, widen

if TYPE_CHECKING:
    from ...runtime.profiler.comparison import Change, ModuleChange


class By(StrEnum):
    """What to list beside the figures."""

    MODULE = "module"


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The profile before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The profile after.")],
    by: Annotated[By | None, typer.Option("--by", help="List modules too, the largest change first.")] = None,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Exit 4 if a figure is worse by more than this (shares: points): 5%."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many modules.")] = 20,
    as_json: Json = False,
) -> int | None:
    """Compare two profiles: each figure, its change, and whether it is for the worse.

    Of the figures, a threshold counts time, tokens per second, bubble, distance, share on time, peaks and overlaps.
    The others explain.
    """
    from ...runtime.profiler.comparison import compare, compare_modules

    allowed = None if threshold is None else parse_share(threshold)
    output = Output()
    before, after = read(a, output)[1], read(b, output)[1]
    changes = compare(before, after)
    modules = compare_modules(before, after) if by is not None else ()
    worse = [c for c in changes if c.gates and allowed is not None and c.worsening > allowed]
    if as_json:
        output.write_json(_document(changes, modules, worse))
    else:
        widen(output.data)
        names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
        output.data.print(change_table(changes, *names))
        if by is not None:
            output.data.print(module_change_table(modules[:top], len(modules), wide=has_room(output.data)))
    for change in worse:
        much = change.change_text.lstrip("+-") or "more than can be told: it was nothing before"
        output.notes.print(f"{change.name} is worse by {much}; {threshold} are tolerated", markup=False)
    return THRESHOLD_FAILED if worse else None


def _document(changes: tuple[Change, ...], modules: tuple[ModuleChange, ...], worse: list[Change]) -> dict[str, object]:
    return {
        "figures": [
            {
                "name": change.name,
                "unit": change.unit,
                "better": change.better,
                "before": change.before,
                "after": change.after,
                "change": change.change,
            }
            for change in changes
        ],
        "modules": modules,
        "over_threshold": [change.name for change in worse],
    }
