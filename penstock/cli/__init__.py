"""The command line: one file per verb, registered in `verbs`; errors become exit codes in `main`, and only there."""

from .entry import main

__all__ = ["main"]
