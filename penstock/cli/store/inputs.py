"""What verbs take: a run's folder, and where in it the store lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

STATES: Final = "states"
"""Of a run's folder, where `penstock.prepare` keeps the block store."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: disk of penstock.prepare.")]
Drives = Annotated[
    list[Path] | None,
    typer.Option(
        "--drive",
        metavar="FOLDER",
        help="Another folder of the run, where it has several and they were moved. May be given several times.",
    ),
]


def store_folders(run: Path, drives: list[Path] | None) -> list[str]:
    """The folders of a run's block store, the home folder first."""
    return [os.fspath(folder / STATES) for folder in (run, *(drives or []))]
