"""Options that several verbs have, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

MACHINE: Final = "Where it runs"
"""Title of the help's panel."""

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Folder of a safetensors checkpoint, or a Hub id.")]
MaxMemory = Annotated[
    str, typer.Option(metavar="BUDGET", help="auto, or for example device=8GiB,host=24GiB.", rich_help_panel=MACHINE)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or emulated:h2d=1GiB/s.", rich_help_panel=MACHINE)]
Disk = Annotated[
    Path | None, typer.Option(help="Folder for scratch files. Default: the user's cache.", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    str, typer.Option(help="auto (as the checkpoint says), bfloat16, float16, float32.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
