"""An object of a JSON file that a person wrote, read key by key, with errors that say what to write instead."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from ..memory.errors import UsageError
from .curves import Curve

_LARGEST = 1e300
"""Whole numbers of JSON may be too large for a float; NaN and infinity are not below it either."""


class Section:
    """One object of such a file, whose keys are asked for by name; what nobody asked for is an error.

    Args:
        data: The object.
        where: The file, for errors.
        path: The way to this object in it.
    """

    def __init__(self, data: Any, *, where: str, path: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where}: {path or 'the file'} is {data!r}: an object is needed there")
        self._data: dict[str, Any] = data
        self._where = where
        self._path = path
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.value(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, value, "a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; none where the key is absent."""
        value = self.value(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(key, value, "a list of texts")
        return tuple(value)

    def number(self, key: str, low: float, high: float, unit: str, default: float | None = None) -> float:
        """A number in a range."""
        return self._checked(key, self.value(key, default), low, high, unit)

    def whole(self, key: str, low: int, high: int, unit: str, default: int | None = None) -> int:
        """A whole number in a range."""
        value = self.number(key, low, high, unit, default)
        if value != int(value):
            raise self.error(key, value, f"a whole number of {unit}")
        return int(value)

    def curve(self, key: str, low: float, high: float, unit: str, default: float | None = None) -> Curve:
        """A number, or an object with `at` and `rate`, two lists: rates in the unit, each at an ascending figure."""
        value = self.value(key, default)
        if not isinstance(value, dict):
            return Curve.flat(self._checked(key, value, low, high, unit))
        inner = Section(value, where=self._where, path=self._way(key))
        at, rates = inner.value("at"), inner.value("rate")
        inner.done()
        if not isinstance(at, list) or not isinstance(rates, list) or len(at) != len(rates) or not at:
            raise self.error(key, value, "a number, or at and rate as lists of the same length")
        checked = [self._checked(f"{key}.rate", each, low, high, unit) for each in rates]
        places = [self._checked(f"{key}.at", each, 1e-6, 1e15, "") for each in at]
        if any(b <= a for a, b in pairwise(places)):
            raise self.error(f"{key}.at", at, "ascending numbers")
        return Curve(x=tuple(places), y=tuple(checked))

    def section(self, key: str) -> Section:
        """An object."""
        return Section(self.value(key), where=self._where, path=self._way(key))

    def sections(self, key: str) -> list[Section]:
        """A list of objects; none where the key is absent."""
        value = self.value(key, [])
        if not isinstance(value, list):
            raise self.error(key, value, "a list of objects")
        return [Section(each, where=self._where, path=f"{self._way(key)}[{n}]") for n, each in enumerate(value)]

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that there are."""
        return tuple(self._data)

    def done(self) -> None:
        """Nothing else is known here.

        Raises:
            UsageError: there is something else.
        """
        for key in self._data:
            if key not in self._asked and not key.startswith("//"):
                near = get_close_matches(key, self._asked, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(self._asked))}"
                raise UsageError(f"{self._where}: {self._way(key)} is not known: {hint}")

    def error(self, key: str, value: object, wanted: str) -> UsageError:
        """What is wrong with a value."""
        return UsageError(f"{self._where}: {self._way(key)} is {value!r}: write {wanted}")

    def value(self, key: str, default: Any = None) -> Any:
        """Whatever is there."""
        self._asked.add(key)
        value = self._data.get(key, default)
        if value is None:
            raise UsageError(f"{self._where}: {self._way(key)} is missing: the file needs it")
        return value

    def _checked(self, key: str, value: object, low: float, high: float, unit: str) -> float:
        wanted = f"a number from {low:g} to {high:g} {unit}".rstrip()
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise self.error(key, value, wanted)
        if not low <= value <= high:
            hint = (
                f" ({value:g} looks like {value / 1e9:g} times 10^9: was it in bytes?)" if value >= high * 1e3 else ""
            )
            raise self.error(key, value, wanted + hint)
        return float(value)

    def _way(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key
