"""Where the command line prints: data on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console


class Output:
    """The two streams of one run of a verb. rich leaves out colours when NO_COLOR is set or a stream is no terminal."""

    def __init__(self) -> None:
        self.data = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        """Results. Lines are wrapped only on a terminal."""
        self.notes = Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())
        """Plans, progress, hints, warnings."""

    def busy(self, what: str) -> AbstractContextManager[object]:
        """A sign of life on stderr while something slow goes on; nothing where stderr is no terminal."""
        return self.notes.status(f"{what} …") if self.notes.is_terminal else nullcontext()

    def write_json(self, record: Any) -> None:
        """Print a dataclass, or anything else that JSON can hold, as one indented JSON document on stdout."""
        print(json.dumps(record, default=_plain, indent=2), file=sys.stdout)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is not JSON")
