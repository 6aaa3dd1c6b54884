"""Where penstock keeps what it measured: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from .runtime.calibration.cache import CalibrationCache
from .runtime.links import LinkCache


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/penstock, else ~/.cache/penstock. Not made here; it may lie in memory, unlike scratch files."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "penstock"


def calibration_cache() -> CalibrationCache:
    """Calibrations of this machine."""
    return CalibrationCache(cache_folder() / "calibration")


def link_cache() -> LinkCache:
    """Link rates: from a calibration where one holds, else as measured in a moment."""
    return LinkCache(cache_folder() / "links.json", calibrations=calibration_cache())
