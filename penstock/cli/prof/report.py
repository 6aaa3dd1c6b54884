"""`penstock prof report`: a profile as one HTML file."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from ...sizes import format_size
from ..output import Output
from .inputs import File, Force, read
from .outfile import refuse_existing, write_whole
from .plain import plain


def report(
    file: File,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.html", help="Default: FILE with .html.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="Lay this profile over it, and list what changed by module."),
    ] = None,
    force: Force = False,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a profile as one HTML file that needs no network.

    With --against another run is laid over it, and changes are those from OTHER to FILE. Prints the name of the file.
    """
    from ...report import build
    from ...runtime.profiler.bubble import idle_by_step

    output = Output()
    path = out if out is not None else file.with_suffix(".html")
    refuse_existing(path, force=force)
    profile, summary = read(file, output)
    other = None if against is None else read(against, output)
    title = file.name if against is None else f"{file.name} against {against.name}"
    with output.busy("drawing"):
        html = build(profile, summary, title=title, idle_steps=idle_by_step(profile), other=other)
    nbytes = write_whole(path, lambda target: _write(target, html), force=force)
    output.notes.print(f"{plain(summary.verdict)} ({format_size(nbytes)} of HTML)", markup=False)
    output.data.print(str(path), markup=False, soft_wrap=True)
    if show and not webbrowser.open(path.resolve().as_uri()):
        output.notes.print(f"no browser was found: open {path} yourself", markup=False)


def _write(target: BinaryIO, html: str) -> None:
    target.write(html.encode())
