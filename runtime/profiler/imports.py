"""What importing libraries takes: measured around each import, from a finder that goes before all others.

Scripts import most of what they use after a recording has begun, and torch imports parts of itself when they are first
used. Only modules from where libraries are installed count. A program's own modules may build a model when they are
imported, and its tensors have names of their own; libraries that such a module imports count as they do elsewhere.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from .recorder import Recorder
from .schema import Category, Tier

_OWN_LOADER: Final = (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader)
"""Kinds of which each module has one to itself; others serve several modules."""
_STANDARD: Final = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
_INSTALLED: Final = frozenset(("site-packages", "dist-packages"))
"""Folders of packages, by name: several environments may be in use."""


class ImportWatch:
    """Counts, while it is entered, by how much the process grows while libraries are imported.

    An import that another one causes is part of it, and so is what other threads take meanwhile.

    Args:
        in_use: Bytes that the process uses now.
    """

    def __init__(self, recorder: Recorder, in_use: Callable[[], int]) -> None:
        self._recorder = recorder
        self._in_use = in_use
        self._under_way = threading.Lock()
        """Held while an import is measured."""

    def __enter__(self) -> ImportWatch:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *failure: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; a library's loader tells when it runs. (Called by Python for modules that are
        not there yet; also by who only asks whether there is a module.)"""
        if self._under_way.locked() or not self._recorder.alive:
            return None
        spec = next((spec for finder in list(sys.meta_path) if (spec := self._asked(finder, name, path, target))), None)
        if spec is not None and type(spec.loader) in _OWN_LOADER and is_library(spec.origin or ""):
            loader: Any = spec.loader
            execute = loader.exec_module
            vars(loader)["exec_module"] = lambda module: self._measured(loader, execute, module)
        return spec

    def _asked(self, finder: Any, *question: Any) -> ModuleSpec | None:
        find = None if finder is self else getattr(finder, "find_spec", None)
        return None if find is None else find(*question)

    def _measured(self, loader: Any, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        if not self._recorder.alive or not self._under_way.acquire(blocking=False):
            return execute(module)
        try:
            before = self._unnamed()
            try:
                execute(module)
            finally:
                self._recorder.memory(self._unnamed() - before, Tier.HOST, Category.LIBRARY)
        finally:
            self._under_way.release()

    def _unnamed(self) -> int:
        """Without tensors that get their names meanwhile: they are not the library's."""
        return self._in_use() - self._recorder.live[Tier.HOST]


def is_library(origin: str) -> bool:
    """Whether a module's file is part of the standard library or of an installed package."""
    return origin.startswith(_STANDARD) or not _INSTALLED.isdisjoint(Path(origin).parts)
