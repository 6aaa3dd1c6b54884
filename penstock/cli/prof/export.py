"""`penstock prof export`: a profile for the tools of others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ...sizes import format_size
from ..output import Output
from .inputs import File, Force, warn
from .outfile import refuse_existing, write_whole


class To(StrEnum):
    """Formats, by the names of `exports.formats.FORMATS`."""

    PERFETTO = "perfetto"
    CHROME = "chrome"
    SPEEDSCOPE = "speedscope"
    CSV = "csv"


def export(
    file: File,
    to: Annotated[To, typer.Option("--to", help="perfetto is best for looking, csv for computing.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Default: FILE with the format's ending.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a profile in a format that other tools read.

    Prints the name of the file.
    """
    from ...runtime.profiler.exports.formats import FORMATS
    from ...runtime.profiler.reader import read_profile

    output = Output()
    chosen = FORMATS[to.value]
    path = out if out is not None else file.with_suffix(chosen.suffix)
    refuse_existing(path, force=force)
    with output.busy(f"writing {path}"):
        profile = read_profile(file)
        nbytes = write_whole(path, lambda target: chosen.write(profile, target), force=force)
    warn(file, profile, output)
    output.notes.print(f"{format_size(nbytes)}; open it in {chosen.opens_in}", markup=False)
    output.data.print(str(path), markup=False, soft_wrap=True)
