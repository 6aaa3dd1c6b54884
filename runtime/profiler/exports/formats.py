"""The registry of formats. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Final

from ..profile import Profile
from .chrome import write_chrome
from .perfetto import write_perfetto
from .sheets import write_csv
from .speedscope import write_speedscope


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write a profile."""

    write: Callable[[Profile, BinaryIO], None]
    suffix: str
    """What such a file's name ends with."""
    opens_in: str
    """What reads it, for people."""


FORMATS: Final[dict[str, Format]] = {
    "perfetto": Format(write=write_perfetto, suffix=".pftrace.gz", opens_in="https://ui.perfetto.dev"),
    "chrome": Format(
        write=write_chrome, suffix=".trace.json.gz", opens_in="chrome://tracing or https://ui.perfetto.dev"
    ),
    "speedscope": Format(
        write=write_speedscope, suffix=".speedscope.json", opens_in="https://www.speedscope.app (compute spans only)"
    ),
    "csv": Format(write=write_csv, suffix=".csv.zip", opens_in="anything that reads CSV: one file per kind of record"),
}
