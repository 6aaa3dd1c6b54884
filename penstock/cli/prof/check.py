"""`penstock prof check`: fail a build whose run does not keep its limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...memory.errors import UsageError
from ...shares import parse_share
from ...sizes import parse_size
from ..output import Output
from .inputs import THRESHOLD_FAILED, File, read
from .plain import plain

if TYPE_CHECKING:
    from ...runtime.profiler.limits import Judgement


def check(
    file: File,
    max_device_peak: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most device memory, for example 8GiB.")
    ] = None,
    max_host_peak: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most host memory of the process, for example 24GiB.")
    ] = None,
    max_bubble: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Most time without computing: 0.2 or 20%.")
    ] = None,
    min_overlap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINK=SHARE",
            help="Least share of a link's busy time with compute beside it: h2d=0.8. Links: disk_read, disk_write, "
            "h2d, d2h. May be given several times.",
        ),
    ] = None,
    max_distance: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Most time / least time possible: 1.15.")
    ] = None,
    min_on_time: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Least share of uses that did not wait: 0.95 or 95%.")
    ] = None,
    no_leaks: Annotated[bool, typer.Option("--no-leaks", help="No memory that grows from step to step.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An earlier profile that this one must not be worse than.")
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="How much worse than the baseline is still good (shares: points). [5%]"),
    ] = None,
) -> int | None:
    """Hold a profile against limits: exit code 0 if all are kept, 4 if not.

    Prints one line if all is well, else one line per limit that is not kept: what was measured, the limit, what to
    change. A limit on something that was not measured is not kept.
    """
    from ...runtime.profiler.limits import Limits, judge, judge_against

    limits = Limits(
        device_peak=None if max_device_peak is None else parse_size(max_device_peak),
        host_peak=None if max_host_peak is None else parse_size(max_host_peak),
        max_bubble=None if max_bubble is None else parse_share(max_bubble),
        max_distance=max_distance,
        min_on_time=None if min_on_time is None else parse_share(min_on_time),
        min_overlap=_overlaps(min_overlap or []),
        no_leaks=no_leaks,
    )
    if limits.empty and baseline is None:
        raise UsageError("there is nothing to check: give a limit, for example --max-bubble 20%, or --baseline FILE")
    if tolerance is not None and baseline is None:
        raise UsageError("--tolerance says how much worse than a baseline is still good: give --baseline FILE too")
    tolerated = parse_share(tolerance if tolerance is not None else "5%")
    output = Output()
    _, summary = read(file, output)
    judgements = list(judge(summary, limits))
    if baseline is not None:
        judgements += judge_against(summary, read(baseline, output)[1], tolerated)
    return _print(judgements, output)


def _print(judgements: list[Judgement], output: Output) -> int | None:
    broken = [judgement.sentence for judgement in judgements if not judgement.holds]
    lines = broken or ["ok: " + "; ".join(judgement.sentence for judgement in judgements)]
    for line in lines:
        output.data.print(plain(line), markup=False, soft_wrap=True)
    return THRESHOLD_FAILED if broken else None


def _overlaps(texts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in (part for given in texts for part in given.split(",")):
        link, sign, share = text.partition("=")
        if not sign or not link.strip():
            raise UsageError(f"--min-overlap {text!r}: write a link and a share, for example h2d=0.8")
        if link.strip() in found:
            raise UsageError(f"--min-overlap names {link.strip()} twice: give it one share")
        found[link.strip()] = parse_share(share)
    return found
