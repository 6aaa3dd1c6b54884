"""`penstock moe replay`: what caches would make of a trace."""

from __future__ import annotations

from ..options import Json
from ..output import Output
from ..tables import lines_of
from .inputs import (
    Admit,
    Between,
    Capacities,
    File,
    Hardware,
    HostCapacity,
    Minimum,
    Policies,
    Prefetch,
    asked_of,
    contenders_of,
    place_of,
    read,
)


def replay(
    file: File,
    policies: Policies = "all",
    capacities: Capacities = "25%,50%",
    minimum: Minimum = None,
    admit: Admit = None,
    prefetch: Prefetch = 0,
    hardware: Hardware = "rtx4090-1ssd",
    host: HostCapacity = "100%",
    between: Between = 0.0,
    as_json: Json = False,
) -> None:
    """Replay a routing trace against cache policies: hits, bytes, and simulated seconds of the expert layers.

    Each layer is planned as a run would plan it, with what the machine's processors, link and drives take; nothing is
    measured here. MIN is Belady's bound: no cache of that size has more hits. All columns but the last are of decoding.

    Examples:

        penstock moe replay made.moe --capacity 12.5%,25%

        penstock moe replay made.moe --policy lru,decayed-lfu --hardware rtx3060-12gb --host 50% --prefetch 2
    """
    from ...scheduler.experts.events import events_of
    from .lab import document, prefetching, run, table

    output = Output()
    contenders = contenders_of(policies, admit, minimum)
    trace = read(file, output)
    place = place_of(hardware, trace, output)
    routing = trace.header.routing
    asked = asked_of(
        routing, contenders, place, capacities=capacities, host=host, prefetch=prefetch, between_ms=between
    )
    with output.busy("replaying"):
        rows = list(run(asked, events_of(trace), place))
    if as_json:
        output.write_json({"trace": trace.header.source, "machine": place.machine, "rows": document(rows, routing)})
        return
    for line in lines_of(table(rows, routing)):
        output.data.print(line)
    output.notes.print(f"seconds are simulated, of the expert layers alone, for {place.machine}", markup=False)
    for sentence in prefetching(rows):
        output.notes.print(sentence, style="yellow", markup=False)
