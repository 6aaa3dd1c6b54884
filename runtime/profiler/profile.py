"""A profile in memory: tables, and one array per column. What reports, metrics and exports read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .schema import RECORDS, Block, Footer, Header, Module, Record, Storage, fields_of

Column = npt.NDArray[np.int64]


class Columns:
    """All records of one kind, one array per field: `profile[Transfer].nbytes`."""

    def __init__(self, kind: type[Record], arrays: Mapping[str, Column]) -> None:
        self.record = kind  # no field is named so: marks have a `kind`, and their column must be reached
        self._arrays = dict(arrays)
        assert tuple(self._arrays) == fields_of(kind), (kind, tuple(self._arrays))

    def __getattr__(self, name: str) -> Column:
        try:
            return self.__dict__["_arrays"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"{self.record.__name__} has no column {name}") from None

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def where(self, mask: npt.NDArray[Any]) -> Columns:
        """The records that a boolean mask, or an array of row numbers, selects."""
        return Columns(self.record, {name: array[mask] for name, array in self._arrays.items()})

    def rows(self) -> Iterable[dict[str, int]]:
        """One dictionary per record: for a few of them."""
        names = list(self._arrays)
        for values in zip(*(array.tolist() for array in self._arrays.values()), strict=True):
            yield dict(zip(names, values, strict=True))

    @staticmethod
    def of(kind: type[Record], records: Iterable[Record]) -> Columns:
        """Columns of records that are there as objects."""
        items = list(records)
        return Columns(
            kind,
            {name: np.array([getattr(r, name) for r in items], dtype=np.int64) for name in fields_of(kind)},
        )

    @staticmethod
    def joined(kind: type[Record], parts: Iterable[Columns]) -> Columns:
        """Several of them one after another."""
        found = list(parts)
        if not found:
            return Columns.of(kind, ())
        return Columns(kind, {n: np.concatenate([part._arrays[n] for part in found]) for n in fields_of(kind)})


@dataclass(kw_only=True)
class Profile:
    """One run."""

    header: Header
    footer: Footer
    columns: dict[type[Record], Columns]
    modules: dict[int, Module] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    storages: dict[int, Storage] = field(default_factory=dict)
    strings: dict[int, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """What was wrong with the file, and what is missing for it: a cut end, a damaged segment."""

    def __getitem__(self, kind: type[Record]) -> Columns:
        return self.columns[kind]

    def string(self, number: int) -> str:
        """A string of the table; "" for none."""
        return self.strings.get(number, "")

    def module_path(self, number: int) -> str:
        """The path of a module, "(root)" for the root, "" for none."""
        found = self.modules.get(number)
        return "" if found is None else found.path or "(root)"

    def span(self) -> tuple[int, int]:
        """First and last instant that anything was recorded at; (began, began) for an empty run."""
        firsts, lasts = [], []
        for kind, first, last in _TIMES:
            columns = self[kind]
            if len(columns):
                firsts.append(int(getattr(columns, first).min()))
                lasts.append(int(getattr(columns, last).max()))
        return (min(firsts), max(lasts)) if firsts else (self.header.began_ns, self.header.began_ns)

    @staticmethod
    def of(header: Header, footer: Footer, records: Iterable[Record], **tables: Any) -> Profile:
        """A profile of records that are there as objects (a simulation, a test)."""
        by_kind: dict[type[Record], list[Record]] = {kind: [] for kind in RECORDS}
        for record in records:
            by_kind[type(record)].append(record)
        columns = {kind: Columns.of(kind, items) for kind, items in by_kind.items()}
        return Profile(header=header, footer=footer, columns=columns, **tables)


def _times() -> tuple[tuple[type[Record], str, str], ...]:
    found = []
    for kind in RECORDS:
        names = fields_of(kind)
        first = next(name for name in ("start", "needed", "at") if name in names)
        last = next(name for name in ("end", "ready", "at") if name in names)
        found.append((kind, first, "at" if first == "at" else last))
    return tuple(found)


_TIMES = _times()
