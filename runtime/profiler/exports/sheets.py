"""CSV: a zip with one file per kind of record, one per table, and the header."""

from __future__ import annotations

import csv
import enum
import io
import zipfile
from collections.abc import Iterable, Sequence
from typing import BinaryIO, Final

import msgspec

from ..profile import Profile
from ..schema import NONE, RECORDS, Block, Category, Cause, Link, MarkKind, Meter, Module, Phase, Step, Storage, Tier
from .labels import enum_label

_ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "phase": Phase,
    "link": Link,
    "cause": Cause,
    "tier": Tier,
    "category": Category,
    "meter": Meter,
    "kind": MarkKind,
}
_SINCE: Final = (1980, 1, 1, 0, 0, 0)
"""The time of every file in the archive: the same profile gives the same bytes."""


def write_csv(profile: Profile, file: BinaryIO) -> None:
    """Write a zip: step.csv, compute.csv, … with a column per field (times in ns, sizes in bytes, empty for none),
    modules.csv, blocks.csv, storages.csv and strings.csv for the numbers in them, header.json and footer.json."""
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED, compresslevel=5) as archive:
        for kind in RECORDS:
            columns = profile[kind]
            names = kind.__struct_fields__
            shown = [
                _column(getattr(columns, name).tolist(), None if kind is Step else _ENUMS.get(name)) for name in names
            ]
            _put(archive, f"{kind.__name__.lower()}.csv", _sheet(names, zip(*shown, strict=True)))
        for table, rows, row_kind in (
            ("modules", profile.modules, Module),
            ("blocks", profile.blocks, Block),
            ("storages", profile.storages, Storage),
        ):
            _put(archive, f"{table}.csv", _table(rows, row_kind.__struct_fields__))
        _put(archive, "strings.csv", _sheet(("number", "text"), sorted(profile.strings.items())))
        _put(archive, "header.json", msgspec.json.format(msgspec.json.encode(profile.header)))
        _put(archive, "footer.json", msgspec.json.format(msgspec.json.encode(profile.footer)))


def _column(values: list[int], kind: type[enum.IntEnum] | None) -> list[object]:
    if kind is not None:
        names = {value: enum_label(kind, value) if value != NONE else "" for value in set(values)}
        return [names[value] for value in values]
    return ["" if value == NONE else value for value in values]


def _table(rows: dict[int, Module] | dict[int, Block] | dict[int, Storage], names: Sequence[str]) -> bytes:
    shown = ((number, *(_cell(getattr(row, name)) for name in names)) for number, row in sorted(rows.items()))
    return _sheet(("number", *names), shown)


def _cell(value: object) -> object:
    if isinstance(value, enum.IntEnum):
        return value.name.lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value == NONE else value


def _sheet(names: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue().encode(errors="replace")  # names may hold halves of characters


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    about = zipfile.ZipInfo(name, date_time=_SINCE)
    about.compress_type = zipfile.ZIP_DEFLATED
    about.external_attr = 0o644 << 16
    archive.writestr(about, content, compresslevel=5)
