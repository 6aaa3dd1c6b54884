"""The HTML report of a profile: one file that needs no network.

A view is a pair of files: `bands.py` turns columns into few enough numbers, `bands.js` draws them.
"""

from .page import build

__all__ = ["build"]
