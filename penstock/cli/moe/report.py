"""`penstock moe report`: the same as one HTML file, and which policy is best for what routing."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ...sizes import format_size
from ..output import Output
from ..prof.outfile import refuse_existing, write_whole
from .inputs import (
    Admit,
    Between,
    Capacities,
    File,
    Force,
    Hardware,
    HostCapacity,
    Minimum,
    Place,
    Policies,
    Prefetch,
    asked_of,
    contenders_of,
    place_of,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

    from ...scheduler.experts.contest import Cell, Contender
    from ...scheduler.experts.trace import Trace

MAP_LAYERS: Final = 4
MAP_SHARE: Final = 0.25
"""Of all experts, what the cache of the map holds."""


def report(
    file: File,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.html", help="Default: TRACE with .html.")
    ] = None,
    policies: Policies = "all",
    capacities: Capacities = "6.25%,12.5%,25%,50%,75%",
    minimum: Minimum = None,
    admit: Admit = None,
    prefetch: Prefetch = 0,
    hardware: Hardware = "rtx4090-1ssd",
    host: HostCapacity = "100%",
    between: Between = 0.0,
    draw_map: Annotated[
        bool,
        typer.Option(
            "--map/--no-map", help="Also run all policies on generated routing of 18 kinds, and map the best."
        ),
    ] = True,
    force: Force = False,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write hit rates and simulated seconds, by policy and capacity, as one HTML file that needs no network.

    The map shows which policy takes least time where skew, drift and words weigh more or less in the gate, with experts
    of the trace's size; it takes a minute or so. Prints the name of the file.
    """
    from rich.progress import Progress

    from ...scheduler.experts.events import events_of
    from .lab import prefetching, run, steps
    from .page import page

    output = Output()
    path = out if out is not None else file.with_suffix(".html")
    refuse_existing(path, force=force)
    contenders = contenders_of(policies, admit, minimum)
    trace = read(file, output)
    place = place_of(hardware, trace, output)
    routing = trace.header.routing
    asked = asked_of(
        routing, contenders, place, capacities=capacities, host=host, prefetch=prefetch, between_ms=between
    )
    cells: list[Cell] = []
    with Progress(console=output.notes, transient=True, disable=not output.notes.is_terminal) as progress:
        events = events_of(trace)
        rows = list(progress.track(run(asked, events, place), total=steps(asked), description="replaying"))
        if draw_map:
            cells = _map(trace, contenders, place, asked.host / routing.total, progress)
    html = page(
        title=f"{file.name}: caches of experts", source=trace.header.source, place=place, routing=routing, rows=rows,
        cells=cells, contenders=contenders, notes=prefetching(rows),
    )  # fmt: skip
    nbytes = write_whole(path, lambda target: target.writelines([html.encode()]), force=force)
    output.notes.print(f"{format_size(nbytes)} of HTML", markup=False)
    output.data.print(str(path), markup=False, soft_wrap=True)
    if show and not webbrowser.open(path.resolve().as_uri()):
        output.notes.print(f"no browser was found: open {path} yourself", markup=False)


def _map(trace: Trace, contenders: Sequence[Contender], place: Place, host: float, progress: Progress) -> list[Cell]:
    import msgspec

    from ...scheduler.experts.contest import compete_over, recipes_around
    from ...scheduler.experts.recipe import Recipe

    routing = msgspec.structs.replace(trace.header.routing, layers=min(trace.header.routing.layers, MAP_LAYERS))
    base = Recipe(routing=routing, expert=place.expert, requests=4, prompt=64, generate=96)
    recipes = list(recipes_around(base))
    cells = compete_over(recipes, contenders, MAP_SHARE, place.scheduler, host=host)
    return list(progress.track(cells, total=len(recipes), description="mapping"))
