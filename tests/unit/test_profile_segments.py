"""One segment of a profile's file: every record comes back, alone, and nothing else is believed."""

import struct
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import footer, header, profile_of, streamed

from penstock.memory.errors import ProfileError
from penstock.runtime.profiler.profile import Columns, Profile
from penstock.runtime.profiler.schema import MAJOR, MINOR, RECORDS, Compute, Gauge, Mark, Record, Transfer, fields_of
from penstock.runtime.profiler.segments import (
    LIMIT_NBYTES,
    MAGIC,
    PREFIX,
    Frame,
    Segment,
    decode,
    encode,
    rows_used,
    time_field,
)

TABLES = ("modules", "blocks", "storages", "strings")
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-1, 300),
    st.sampled_from([-(2**63), 2**63 - 1, -1, 0]),
)


@st.composite
def columns_of_any_kind(draw: st.DrawFn) -> Columns:
    kind = draw(st.sampled_from(RECORDS))
    count = draw(st.integers(1, 12))
    return Columns(
        kind,
        {
            name: np.array(draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=np.int64)
            for name in fields_of(kind)
        },
    )


def tables_of(profile: Profile) -> dict[str, dict[int, Any]]:
    return {name: getattr(profile, name) for name in TABLES}


def segment_of(profile: Profile) -> Segment:
    return Segment(
        header=profile.header,
        footer=profile.footer,
        columns=profile.columns,
        tables=rows_used(profile.columns, tables_of(profile)),
    )


def assert_same(found: Columns, wanted: Columns) -> None:
    assert found.record is wanted.record
    for name in fields_of(found.record):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
        assert getattr(found, name).dtype == np.int64


def sealed(payload: bytes, *, major: int = MAJOR, minor: int = MINOR, inflated: int | None = None) -> bytes:
    """A segment whose frame is in order, around any payload."""
    stored = zlib.compress(payload, 1)
    length = len(payload) if inflated is None else inflated
    prefix = PREFIX.pack(MAGIC, major, minor, len(stored), length, 0)[:-4]
    return prefix + struct.pack("<I", zlib.crc32(stored, zlib.crc32(prefix))) + stored


def contents(**changes: Any) -> dict[str, Any]:
    made = {"header": msgspec.to_builtins(header()), "footer": msgspec.to_builtins(footer()), "columns": {}}
    return {**made, **changes}


@given(st.lists(columns_of_any_kind(), max_size=4))
@settings(max_examples=60)
def test_every_record_comes_back(given_columns: list[Columns]) -> None:
    columns = {found.record: found for found in given_columns}
    back = decode(encode(Segment(header=header(), footer=footer(), columns=columns)))
    assert (back.header, back.footer) == (header(), footer())
    assert tuple(back.columns) == RECORDS
    for kind in RECORDS:
        assert_same(back.columns[kind], columns.get(kind, Columns.of(kind, ())))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 1000])
def test_arrays_of_all_shapes_come_back(count: int) -> None:
    at = np.arange(count, dtype=np.int64)
    for values in (
        at,
        at * -(2**40),
        np.full(count, -1),
        at % 3 - 1,
        at**3 * 2**33,
        np.resize([-(2**63), 2**63 - 1], count),
    ):
        gauges = Columns(Gauge, {"at": at * 10**9, "meter": at % 8, "value": values.astype(np.int64)})
        back = decode(encode(Segment(header=header(), footer=footer(), columns={Gauge: gauges})))
        assert_same(back.columns[Gauge], gauges)


def test_the_kinds_of_marks_are_a_column() -> None:
    marks = Columns.of(Mark, [Mark(at=5, kind=3), Mark(at=6, kind=4, text=1)])  # type: ignore[arg-type]
    back = decode(encode(Segment(header=header(), footer=footer(), columns={Mark: marks})))
    assert back.columns[Mark].kind.tolist() == [3, 4]


def test_a_streamed_run_takes_few_bytes() -> None:
    profile = streamed(250)
    data = encode(segment_of(profile))
    assert len(data) < 20 * sum(len(profile[kind]) for kind in RECORDS)
    back = decode(data)
    assert back.tables == segment_of(profile).tables
    for kind in RECORDS:
        assert_same(back.columns[kind], profile[kind])


def test_only_rows_in_use_are_kept() -> None:
    profile = profile_of([Compute(module=3, phase=0, start=0, end=1), Mark(at=1, kind=6, text=1)])  # type: ignore[arg-type]
    used = rows_used(profile.columns, tables_of(profile))
    assert {name: sorted(rows) for name, rows in used.items()} == {
        "modules": [0, 3],  # and its parent
        "blocks": [],
        "storages": [],
        "strings": [1],  # a computation's phase is none
    }


def test_rows_point_on_at_modules_and_missing_rows_do_no_harm() -> None:
    transfer = Transfer(id=0, block=1, link=0, nbytes=1, cause=0, issued=0, start=0, end=1)  # type: ignore[arg-type]
    lost = msgspec.structs.replace(transfer, block=77)
    profile = profile_of([transfer, lost, Compute(module=99, phase=0, start=0, end=1)])  # type: ignore[arg-type]
    used = rows_used(profile.columns, tables_of(profile))
    assert (sorted(used["blocks"]), sorted(used["modules"])) == ([1], [0, 2])


def test_modules_that_are_their_own_parents_end() -> None:
    profile = profile_of([Compute(module=0, phase=0, start=0, end=1)])  # type: ignore[arg-type]
    profile.modules[0] = msgspec.structs.replace(profile.modules[0], parent=0)
    assert sorted(rows_used(profile.columns, tables_of(profile))["modules"]) == [0]


@pytest.mark.parametrize("kind", RECORDS)
def test_records_are_sorted_by_when_they_began(kind: type[Record]) -> None:
    assert time_field(kind) in ("start", "needed", "at")


def test_what_a_newer_minor_version_added_is_passed_over() -> None:
    column = [0, 7, 0, 0, b""]
    gauge = {"count": 2, "fields": {"at": column, "meter": column, "value": column, "colour": [9, 0, 0, 0, b""]}}
    payload = contents(columns={"Gauge": gauge, "Sound": {"count": 3, "fields": {"at": "?"}}}, sounds={1: "x"})
    payload["columns"]["Sound"] = {"count": 3, "fields": {}}
    payload["footer"]["mood"] = [1, 2]
    back = decode(sealed(msgspec.msgpack.encode(payload), minor=MINOR + 5))
    assert back.columns[Gauge].value.tolist() == [0, 0]
    assert back.footer == footer()


def test_what_an_older_minor_version_lacks_is_filled() -> None:
    payload = contents(columns={"Gauge": {"count": 2, "fields": {"at": [1, 7, 3, 0, b""]}}})
    back = decode(sealed(msgspec.msgpack.encode(payload)))
    assert back.columns[Gauge].at.tolist() == [7, 10]
    assert back.columns[Gauge].value.tolist() == [-1, -1]


def test_a_newer_major_version_is_refused_with_both_versions() -> None:
    with pytest.raises(ProfileError, match=rf"version {MAJOR + 1}\.3 .* up to {MAJOR}\.x"):
        decode(sealed(b"anything", major=MAJOR + 1, minor=3))


def test_any_flipped_bit_is_noticed() -> None:
    data = encode(segment_of(streamed(2)))
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ProfileError):
            decode(bytes(damaged))


@pytest.mark.parametrize("left", [0, 1, len(MAGIC), PREFIX.size - 1, PREFIX.size, PREFIX.size + 1, -1])
def test_a_segment_that_is_cut_off_is_refused(left: int) -> None:
    with pytest.raises(ProfileError):
        decode(encode(segment_of(streamed(2)))[:left])


def packed(*, way: int = 0, first: int = 0, base: int = 0, width: int = 0, planes: bytes = b"") -> list[object]:
    return [way, first, base, width, planes]


@pytest.mark.parametrize(
    "column",
    [
        packed(way=3),
        packed(width=9, planes=b"." * 18),
        packed(width=-1),
        packed(width=1, planes=b"."),
        packed(way=1, width=1, planes=b".."),
        packed(planes=b"."),
        [0, 0],
        ["a", 0, 0, 0, b""],
        [0, 2**64, 0, 0, b""],
    ],
)
def test_arrays_that_contradict_themselves_are_refused(column: list[object]) -> None:
    try:
        payload = msgspec.msgpack.encode(contents(columns={"Gauge": {"count": 2, "fields": {"at": column}}}))
    except OverflowError:
        return  # cannot even be said
    with pytest.raises(ProfileError, match="contents cannot be read"):
        decode(sealed(payload))


@pytest.mark.parametrize("count", [-1, 2**27, 2**62])
def test_counts_are_checked_before_anything_is_allocated(count: int) -> None:
    payload = contents(columns={"Gauge": {"count": count, "fields": {"at": packed()}}})
    with pytest.raises(ProfileError, match="contents cannot be read"):
        decode(sealed(msgspec.msgpack.encode(payload)))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc0", b"\x80", b"\x93" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x81\xa1x" + b"\x91" * 100_000]
)
def test_payloads_that_are_none_are_refused(payload: bytes) -> None:
    with pytest.raises(ProfileError):
        decode(sealed(payload))


@pytest.mark.parametrize("inflated", [0, 10, 10**5 - 1, 10**5 + 1, LIMIT_NBYTES + 1])
def test_no_more_is_inflated_than_was_promised(inflated: int) -> None:
    with pytest.raises(ProfileError):
        decode(sealed(bytes(10**5), inflated=inflated))


def test_lengths_are_looked_at_first() -> None:
    frame = Frame.of(PREFIX.pack(MAGIC, MAJOR, MINOR, 100, 100 * 2000, 0))
    assert frame is not None
    assert not frame.plausible
    large = Frame.of(PREFIX.pack(MAGIC, MAJOR, MINOR, LIMIT_NBYTES + 1, 10, 0))
    assert large is not None
    assert not large.plausible
    assert Frame.of(b"PK\x03\x04" + bytes(40)) is None
