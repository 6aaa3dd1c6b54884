"""Number arrays inside a page: one compressed blob, and references into it that travel as JSON."""

from __future__ import annotations

import base64
import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_ALIGNMENT: Final = 8  # a browser's typed arrays start at multiples of their element size
_INTEGERS: Final = (("u1", 0, 2**8), ("u2", 0, 2**16), ("i4", -(2**31), 2**31))


class Arrays:
    """Collects arrays; `encoded()` is what the page carries."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, values: npt.ArrayLike, *, delta: bool = False) -> dict[str, Any]:
        """Keep an array, in the narrowest type that holds it, and return the reference to it.

        Floats keep 24 bits of precision. With `delta`, differences are kept: sorted times become small numbers.
        """
        array = np.asarray(values)
        if delta:
            array = np.diff(array, prepend=array.dtype.type(0))
        code = _code_of(array)
        data = array.astype(f"<{code}").tobytes()
        reference = {"at": self._length, "n": int(array.size), "of": code}
        if delta:
            reference["delta"] = 1
        self._parts.append(data + b"\0" * (-len(data) % _ALIGNMENT))
        self._length += len(self._parts[-1])
        return reference

    def encoded(self) -> str:
        """The blob: zlib, then base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 6)).decode("ascii")


def _code_of(array: npt.NDArray[Any]) -> str:
    if array.dtype.kind == "f":
        return "f4"
    if not array.size:
        return "u1"
    low, high = int(array.min()), int(array.max())
    return next((code for code, least, end in _INTEGERS if least <= low and high < end), "f8")
