"""`penstock demo`: a model streams through a budget of a third of itself, with the resident model's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..memory.errors import UsageError
from ..sizes import parse_size
from .output import Output


def demo(
    size: Annotated[str, typer.Option(metavar="SIZE", help="About how large the checkpoint is to be.")] = "1GiB",
    disk: Annotated[
        Path | None, typer.Option(help="Folder to write the checkpoint below. Default: the user's cache.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Write the checkpoint to this new folder, and leave it there.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the table as an SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> int:
    """Stream a small random model through a third of its memory and compare with the resident model.

    Writes a Llama-shaped checkpoint, runs it resident, streamed on the CPU, and streamed on an emulated device, each in
    a process of its own, and prints speed, peak memory, the machine's bound, and whether the tokens are the same. Ends
    with 1 if they are not. Needs no network and removes what it wrote.
    """
    nbytes = parse_size(size)
    if keep is not None and disk is not None:
        raise UsageError("--keep names the folder, --disk one to write below and clean up: give one of them")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"--keep {keep}: it is there already; name a new folder, or remove it")
    if svg is not None and svg.exists():
        raise UsageError(f"--svg {svg}: it is there already; name a new file, or remove it")
    output = Output()
    with output.busy("starting"):
        from .demonstration import demonstrate  # torch takes seconds
    return demonstrate(output, nbytes=nbytes, disk=disk, keep=keep, svg=svg, as_json=as_json)
