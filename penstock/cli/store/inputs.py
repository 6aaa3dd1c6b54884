"""What verbs take: a run's folder, and where in it the store lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from ...memory.errors import UsageError

STATES: Final = "states"
"""Of a run's folder, where `penstock.prepare` keeps the block store."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: disk of penstock.prepare.")]
Kept = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Of a run (disk of penstock.prepare), or of a penstock.PrefixStore.")
]
Drives = Annotated[
    list[Path] | None,
    typer.Option(
        "--drive",
        metavar="FOLDER",
        help="Another folder of the run, where it has several and they were moved. May be given several times.",
    ),
]


def refuse_drives(folder: Path, drives: list[Path] | None) -> None:
    """See that no drives were named with a prefix store, which has one folder.

    Raises:
        UsageError: some were.
    """
    if drives:
        raise UsageError(f"{folder} is a prefix store, which lies in one folder: leave --drive out")


def store_folders(run: Path, drives: list[Path] | None) -> list[str]:
    """The folders of a run's block store, the home folder first."""
    return [os.fspath(folder / STATES) for folder in (run, *(drives or []))]
