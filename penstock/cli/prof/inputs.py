"""What verbs take: a profile from its file, its figures, and what to warn of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..output import Output
from .plain import plain

if TYPE_CHECKING:
    from ...runtime.profiler.profile import Profile
    from ...runtime.profiler.summary import Summary

THRESHOLD_FAILED: Final = 4
"""Exit code where a run does not keep its limits."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="A profile.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output if it is there.")]


def read(path: Path, output: Output) -> tuple[Profile, Summary]:
    """A profile and its figures. What is missing or damaged in it is told on stderr.

    Raises:
        ProfileError: the file is not there or not a profile, or a newer penstock wrote it.
    """
    from ...runtime.profiler.metrics import summarise
    from ...runtime.profiler.reader import read_profile

    with output.busy(f"reading {path}"):
        profile = read_profile(path)
        summary = summarise(profile)
    warn(path, profile, output)
    return profile, summary


def warn(path: Path, profile: Profile, output: Output) -> None:
    """Tell on stderr what a reader of the figures must know."""
    for warning in warnings(profile):
        output.notes.print(plain(f"warning: {path}: {warning}"), markup=False)


def warnings(profile: Profile) -> list[str]:
    """What a reader of the figures must know: losses, damage, a run that did not end in order, made-up links."""
    footer = profile.footer
    found = list(profile.problems)
    if footer.dropped > 0:
        lost = f"{footer.dropped} of {footer.recorded} records were lost"
        found.append(f"{lost} (see the log of the run for why); the figures are of the others")
    if footer.failure:
        found.append(f"the run ended by {footer.failure}")
    elif not footer.last:
        found.append("the run has not ended, or was killed; the figures are of what was written")
    if profile.header.emulated:
        found.append("links were emulated: times are not those of a real device")
    return found
