"""Which parameters weight decay leaves alone, as name patterns for parameter groups."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Mapping, Sequence
from typing import Final

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def undecayed(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Patterns of the parameters that are customarily not decayed, and of no others: norms and biases.

    These are the parameters of fewer than two dimensions, whatever a model calls its norms, and what is named a bias.

    Args:
        shapes: Of all parameters, by name.
    """
    chosen = [name for name, dims in shapes.items() if len(dims) < 2 or name.endswith("bias")]
    patterns = tuple(dict.fromkeys(_NUMBER.sub("*", glob.escape(name)) for name in chosen))
    matched = {name for name in shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    return patterns if matched == set(chosen) else tuple(glob.escape(name) for name in chosen)
