"""`penstock prof live`: a run that is being recorded, as it goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from ...memory.errors import UsageError
from ..output import Output


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A recording to watch."""

    title: str
    path: Path
    pid: int | None = None
    """The process that records, where it is known."""


def live(
    target: Annotated[str, typer.Argument(metavar="PID|FILE", help="A process that records, or the file it writes.")],
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often to look.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and end.")] = False,
) -> None:
    """Watch a run while it is recorded: memory against budgets, links, the module at work, what waits.

    Ends when the recording does. Rates are of the last 5 seconds.
    """
    from ...runtime.profiler.reader import follow
    from .dashboard import draw
    from .watch import Watch

    output, found, watch = Output(), resolve(target), Watch()
    part, offset = follow(found.path, 0)
    if part is not None:
        watch.add(part)
    if once:
        output.data.print(draw(watch.now(), found.title))
        return
    with Live(console=output.data, auto_refresh=False) as screen:
        recording = True
        while recording and not watch.ended:
            screen.update(draw(watch.now(), found.title), refresh=True)
            time.sleep(interval)
            recording = _recording(found)  # asked first: what a process wrote before its end is shown
            part, offset = follow(found.path, offset)
            if part is not None:
                watch.add(part)
        screen.update(draw(watch.now(), found.title), refresh=True)
    if not output.data.is_terminal:
        output.data.print()  # elsewhere only the last state is printed, without the end of its last line


def resolve(text: str) -> Target:
    """What a PID or a file name means. A number is a file only where there is one of that name.

    Raises:
        UsageError: no recording of this process is running.
    """
    from ...runtime.profiler.running import find, running

    path = Path(text)
    if not text.isdecimal() or path.exists():
        recorders = (each.pid for each in running() if each.path == str(path.absolute()))
        return Target(title=path.name, path=path, pid=next(recorders, None))
    entry = find(int(text))
    if entry is None:
        others = ", ".join(f"{each.pid} ({Path(each.path).name})" for each in running()) or "none at all"
        raise UsageError(f"process {text} records nothing; those that do: {others}. Name the file if there is one.")
    return Target(title=f"{entry.pid} ({Path(entry.path).name})", path=Path(entry.path), pid=entry.pid)


def _recording(target: Target) -> bool:
    """Whether more may come. Where the process is not known (it runs elsewhere, it was killed) nothing tells: the file
    is watched until its last segment, or Ctrl-C."""
    from ...runtime.profiler.running import find

    return target.pid is None or find(target.pid) is not None
