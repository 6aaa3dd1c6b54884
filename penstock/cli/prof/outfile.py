"""Files that verbs make: whole or not at all, and never over another without being told so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ...memory.errors import DiskError, UsageError


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise before any work is done for an output that could not be kept.

    Raises:
        UsageError: it is there and `force` is not given, or it is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file by -o")
    if not force and os.path.lexists(path):
        raise UsageError(f"{path} is there already: overwrite it by --force, or name another file by -o")


def write_whole(path: Path, write: Callable[[BinaryIO], None], *, force: bool) -> int:
    """Write a file beside its place and move it there; its size in bytes.

    Raises:
        UsageError: see `refuse_existing`.
        DiskError: it cannot be written. Nothing of it is left.
    """
    refuse_existing(path, force=force)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)  # type: ignore[arg-type]  # a wrapper with all the methods of a binary file
            nbytes = file.tell()
        temporary.chmod(0o666 & ~_umask())  # as of any file that a program makes; temporary ones are private
        refuse_existing(path, force=force)  # writing may have taken long
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"cannot write {path}: {reason}. Name a file in another folder by -o.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return nbytes


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by being set
    os.umask(mask)
    return mask
