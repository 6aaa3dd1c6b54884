"""Machines whose figures are known: one JSON file each, beside this one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..memory.errors import UsageError
from ..scheduler.datasheet import parse_hardware, read_hardware
from ..scheduler.hardware import Hardware


def names() -> tuple[str, ...]:
    """Of all that are shipped."""
    files = (Path(each.name) for each in resources.files(__name__).iterdir())
    return tuple(sorted(file.stem for file in files if file.suffix == ".json"))


def load(name: str) -> Hardware:
    """A shipped machine by name, or one from a hardware file.

    Raises:
        UsageError: there is neither, or the file is no hardware file.
    """
    if name in names():
        return parse_hardware(resources.files(__name__).joinpath(f"{name}.json").read_text("utf-8"), where=name)
    if not Path(name).is_file():
        raise UsageError(f"--hardware {name!r} is no file and no machine known here: use {', '.join(names())}")
    return read_hardware(Path(name))
