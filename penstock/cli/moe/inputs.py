"""What the verbs take: a trace from its file, capacities, policies, and a machine to simulate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ...memory.errors import UsageError
from ...sizes import UNITS, format_size, parse_size
from ..output import Output

if TYPE_CHECKING:
    from ...scheduler.experts.contest import Contender
    from ...scheduler.experts.layerscheduler import LayerScheduler
    from ...scheduler.experts.shape import ExpertShape, Routing
    from ...scheduler.experts.trace import Trace
    from .lab import Asked

_MACHINE: Final = "Where it would run"
_CACHE: Final = "The cache"

File = Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output if it is there.")]
Policies = Annotated[str, typer.Option("--policy", metavar="NAME,…", help="Policies, or all.", rich_help_panel=_CACHE)]
Capacities = Annotated[
    str,
    typer.Option(
        "--capacity",
        metavar="SIZE,…",
        help="What the cache holds: shares of all experts (25%), sizes (2GiB), or numbers of experts (128).",
        rich_help_panel=_CACHE,
    ),
]
Minimum = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of its equal part that a layer keeps: 1 is a part of its own for each, 0 one pool. Default: 1.",
        rich_help_panel=_CACHE,
    ),
]
Admit = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="When a miss comes in. always; better: worth more than what it replaces; proven: even without the use at "
        "hand; adaptive: always, or proven in layers where that hits nothing. Default: adaptive.",
        rich_help_panel=_CACHE,
    ),
]
Prefetch = Annotated[
    int,
    typer.Option(min=0, help="Experts of the next layer to prefetch at most; 0 for none.", rich_help_panel=_CACHE),
]
Hardware = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE", help="A known machine, a hardware file, or this: this one, as `penstock calibrate` found.",
        rich_help_panel=_MACHINE,
    ),
]  # fmt: skip
HostCapacity = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="What the host holds, beside a device; the rest is on disk. As --capacity.",
        rich_help_panel=_MACHINE,
    ),
]  # fmt: skip
Between = Annotated[
    float,
    typer.Option(
        min=0, metavar="MS", help="Milliseconds between the experts of one layer and of the next: links are idle then.",
        rich_help_panel=_MACHINE,
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a trace is replayed on."""

    machine: str
    """Its name."""
    scheduler: LayerScheduler
    expert: ExpertShape
    separate: bool
    """Whether it has a device with a memory of its own."""
    has_drives: bool


def read(path: Path, output: Output) -> Trace:
    """A trace. What is missing of it is told on stderr.

    Raises:
        TraceError: it cannot be read.
        UsageError: there is nothing in it.
    """
    from ...scheduler.experts.tracefile import read_trace

    with output.busy(f"reading {path}"):
        trace = read_trace(path)
    for problem in trace.problems:
        output.notes.print(f"warning: {path}: {problem}", style="yellow", markup=False)
    if not trace.steps:
        raise UsageError(f"{path} has no steps: nothing was recorded into it")
    return trace


def place_of(hardware: str, trace: Trace, output: Output) -> Place:
    """The machine, and what experts of the trace cost on it.

    Raises:
        UsageError: it is not known, or the trace does not say how large experts are.
    """
    from ...scheduler.cost import CostModel
    from ...scheduler.experts.costs import expert_costs
    from ...scheduler.experts.layerscheduler import LayerScheduler

    expert = trace.header.expert
    if expert is None:
        raise UsageError("the trace does not say how large its experts are: record it with their sizes")
    if hardware == "this":
        from ..machines import find_machine

        machine = find_machine(None, device="auto", disk=None, output=output)
    else:
        from ...hardware import load

        machine = load(hardware)
    costs = expert_costs(CostModel(hardware=machine), expert)
    return Place(
        machine=machine.name,
        scheduler=LayerScheduler(costs),
        expert=expert,
        separate=costs.separate,
        has_drives=bool(machine.drives),
    )


def parse_capacities(text: str, routing: Routing, expert_nbytes: int, option: str = "--capacity") -> list[int]:
    """Numbers of experts, ascending, each once.

    Raises:
        UsageError: one of them has no meaning, or is more than there are.
    """
    return sorted({_capacity(each.strip(), routing, expert_nbytes, option) for each in text.split(",")})


def _capacity(text: str, routing: Routing, expert_nbytes: int, option: str) -> int:
    if text.endswith("%"):
        number = text.removesuffix("%")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", number) or float(number) > 100:
            raise UsageError(f"{option} {text!r}: a share is between 0% and 100%")
        return round(float(number) / 100 * routing.total)
    if text.isdecimal():
        count = int(text)
    elif any(text.endswith(unit) for unit in UNITS):
        count = parse_size(text) // expert_nbytes
        if count == 0:
            raise UsageError(f"{option} {text} holds no expert: one takes {format_size(expert_nbytes)}")
        count = min(count, routing.total)
    else:
        raise UsageError(f"{option} {text!r}: write for example 25%, 2GiB, or a number of experts such as 128")
    if count > routing.total:
        raise UsageError(f"{option} {text}: there are {routing.total} experts in all layers together")
    return count


def parse_policies(text: str) -> list[str]:
    """Names of policies, in the order given.

    Raises:
        UsageError: one is not known.
    """
    from ...scheduler.experts.policies import POLICIES

    if text == "all":
        return list(POLICIES)
    names = list(dict.fromkeys(each.strip() for each in text.split(",")))
    for name in names:
        if name not in POLICIES:
            raise UsageError(f"--policy {name!r} is not known: use {', '.join(POLICIES)}, or all")
    return names


def contenders_of(policies: str, admit: str | None, minimum: float | None) -> list[Contender]:
    """What is to be compared: each policy, in caches that are run alike.

    Raises:
        UsageError: a policy or a rule is not known.
    """
    from ...scheduler.experts.cache import ADMISSION, ADMISSIONS, MINIMUM
    from ...scheduler.experts.contest import Contender

    rule = next((known for known in ADMISSIONS if known == (admit or ADMISSION)), None)
    if rule is None:
        raise UsageError(f"--admit {admit!r} is not known: use {', '.join(ADMISSIONS)}")
    share = MINIMUM if minimum is None else minimum
    return [Contender(policy=name, admission=rule, minimum=share) for name in parse_policies(policies)]


def host_of(text: str, place: Place, routing: Routing) -> int:
    """Experts that the host holds.

    Raises:
        UsageError: the rest would have to be on disk, and there is no drive; or there is no host beside a device.
    """
    found, *more = parse_capacities(text, routing, place.expert.nbytes, "--host")
    if more:
        raise UsageError(f"--host {text!r} names {1 + len(more)} sizes: it takes one; --capacity takes several")
    if found < routing.total and not place.separate:
        raise UsageError(f"{place.machine} has no device: --capacity is what its memory holds; leave --host out")
    return found


def asked_of(
    routing: Routing,
    contenders: Sequence[Contender],
    place: Place,
    *,
    capacities: str,
    host: str,
    prefetch: int,
    between_ms: float,
) -> Asked:
    """What is to be replayed, from the options of the verbs.

    Raises:
        UsageError: an option has no meaning, or experts would have to be on a drive that is not there.
    """
    from .lab import Asked

    asked = Asked(
        routing=routing,
        contenders=contenders,
        capacities=parse_capacities(capacities, routing, place.expert.nbytes),
        host=host_of(host, place, routing),
        prefetch=prefetch,
        between_s=between_ms / 1e3,
    )
    check_drives(place, routing, asked.capacities, asked.host)
    return asked


def percent(count: int, routing: Routing) -> str:
    """A number of experts, for people."""
    return f"{100 * count / routing.total:.3g}%"


def check_drives(place: Place, routing: Routing, capacities: Sequence[int], host: int) -> None:
    """Raise where experts would have to be on a drive that is not there.

    Raises:
        UsageError: so it is.
    """
    least = host if place.separate else min(capacities)
    if least < routing.total and not place.has_drives:
        raise UsageError(f"{place.machine} has no drive that {routing.total - least} experts could be read from")
