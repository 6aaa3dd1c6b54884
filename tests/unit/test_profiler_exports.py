"""Exports, held against the rules of their formats; Perfetto's by its own schema and, where there is one, its own
trace processor."""

import csv
import gzip
import io
import json
import shutil
import zipfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import MIB, profile_of, streamed

from penstock.runtime.profiler.exports.chrome import write_chrome
from penstock.runtime.profiler.exports.lanes import disjoint, edges, nesting
from penstock.runtime.profiler.exports.levels import levels
from penstock.runtime.profiler.exports.perfetto import write_perfetto
from penstock.runtime.profiler.exports.sheets import write_csv
from penstock.runtime.profiler.exports.speedscope import write_speedscope
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import (
    RECORDS,
    Category,
    Cause,
    Compute,
    Gauge,
    Link,
    Mark,
    MarkKind,
    Memory,
    Meter,
    Phase,
    Record,
    Tier,
    Transfer,
    Wait,
)

Spans = list[tuple[int, int]]
SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=25)


def rich() -> Profile:
    """Two hops that overlap others, two lanes (one whose spans cross), waits, marks, memory in two tiers, gauges."""
    records: list[Record] = []
    for number in range(6):
        start = 1_000_001 + number * 1_000
        common = {"block": number % 4, "nbytes": 10 * MIB, "cause": Cause.PREFETCH, "issued": start - 500}
        records.append(Transfer(id=2 * number, link=Link.DISK_READ, start=start, end=start + 3_500, **common))
        hop = {"id": 2 * number + 1, "parent": 2 * number, "start": start + 100, "end": start + 3_600}
        records.append(Transfer(link=Link.H2D, **hop, **common))
        records.append(Wait(block=number % 4, needed=start, ready=start + 3_600, module=number % 4 + 1))
        records.append(Memory(at=start, tier=Tier.DEVICE, category=Category.WEIGHT, nbytes=MIB, module=1))
        records.append(Memory(at=start, tier=Tier.HOST, category=Category.ARENA, nbytes=-MIB if number > 4 else MIB))
        records.append(Gauge(at=start, meter=Meter.HOST_RSS, value=number * MIB))
    records += [
        Compute(module=0, phase=Phase.FORWARD, start=1_000_000, end=1_010_000),
        Compute(module=1, phase=Phase.FORWARD, start=1_000_000, end=1_004_000, depth=1),
        Compute(module=2, phase=Phase.BACKWARD, start=1_004_000, end=1_010_000, depth=1),
        Compute(module=3, phase=Phase.FORWARD, start=1_000_000, end=1_005_000, lane=7),
        Compute(module=4, phase=Phase.FORWARD, start=1_004_000, end=1_006_000, lane=7),
        Mark(at=1_002_000, kind=MarkKind.NOTE, text=0),
        Gauge(at=1_000_000, meter=Meter.ENERGY_CPU, value=5),
    ]
    return profile_of(records)


def profiles() -> list[Profile]:
    return [rich(), streamed(), profile_of([])]


def chrome(profile: Profile) -> dict[str, Any]:
    file = io.BytesIO()
    write_chrome(profile, file)
    document: dict[str, Any] = json.loads(gzip.decompress(file.getvalue()))
    return document


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


@pytest.mark.parametrize("profile", profiles())
def test_chrome_keeps_the_rules_of_its_format(profile: Profile) -> None:
    events = chrome(profile)["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    assert all(event["ts"] >= 0 for event in timed)
    begun: dict[tuple[str, str], dict[str, Any]] = {}
    seen = set()
    stacks: dict[int, list[int]] = defaultdict(list)
    for event in timed:
        assert {"ph", "pid", "tid", "name"} <= event.keys()
        if event["ph"] == "b":
            key = (event["cat"], event["id"])
            assert key not in seen
            seen.add(key)
            begun[key] = event
        elif event["ph"] == "e":
            begin = begun.pop((event["cat"], event["id"]))
            assert (begin["name"], begin["pid"]) == (event["name"], event["pid"])
        elif event["ph"] == "X":
            start = nanoseconds(event["ts"])
            end = start + nanoseconds(event["dur"])
            stack = stacks[event["tid"]]
            while stack and stack[-1] <= start:
                stack.pop()
            assert not stack or end <= stack[-1]
            stack.append(end)
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            assert event["ph"] == "i"
    assert not begun
    assert len(seen) == len(profile[Transfer]) + len(profile[Wait])
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert set(stacks) <= named


def test_chrome_says_what_happened() -> None:
    document = chrome(rich())
    events = document["traceEvents"]
    assert document["otherData"]["run"] == "0123456789abcdef"
    hop = next(event for event in events if event["ph"] == "b" and event["cat"] == "h2d")
    assert hop["args"] == {
        "block": "layers.0",
        "nbytes": 10 * MIB,
        "cause": "prefetch",
        "transfer": 1,
        "parent": 0,
        "queued_us": 0.6,
        "failed": 0,
    }
    crossing = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert crossing == ["compute 0", "compute 7", "compute 7 (crossing 1)"]
    arena = [event["args"]["nbytes"] for event in events if event["name"] == "host arena"]
    assert arena == [n * MIB for n in (1, 2, 3, 4, 5, 4)]


@given(SPANS)
def test_lanes_hold_every_span_once_and_nest(spans: Spans) -> None:
    starts, ends = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
    lanes = nesting(starts, ends)
    assert sorted(row for lane in lanes for row in lane) == list(range(len(spans)))
    for lane in lanes:
        for i, outer in enumerate(lane):
            for inner in lane[i + 1 :]:
                assert spans[inner][0] >= spans[outer][1] or spans[inner][1] <= spans[outer][1]
        open_rows: list[int] = []
        times = []
        for edge in edges(lane, starts, ends):
            times.append(edge.at)
            if edge.begins:
                open_rows.append(edge.row)
            else:
                assert open_rows.pop() == edge.row
        assert not open_rows
        assert times == sorted(times)


@given(SPANS)
def test_as_few_lanes_as_spans_overlap(spans: Spans) -> None:
    spans = [(start, end + 1) for start, end in spans]
    starts, ends = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
    lanes = disjoint(starts, ends)
    assert sorted(row for lane in lanes for row in lane) == list(range(len(spans)))
    for lane in lanes:
        assert all(spans[a][1] <= spans[b][0] for a, b in pairwise(lane))
    most = max((sum(start <= at < end for start, end in spans) for at in range(45)), default=0)
    assert len(lanes) == most


def test_a_span_that_ends_before_it_begins_takes_no_time() -> None:
    profile = profile_of([Compute(module=0, phase=Phase.FORWARD, start=5_000, end=1_000)])
    (event,) = [event for event in chrome(profile)["traceEvents"] if event["ph"] == "X"]
    assert event["dur"] == 0


def test_levels_sum_up_with_one_value_per_instant() -> None:
    records = [
        Memory(at=at, tier=Tier.HOST, category=Category.KV, nbytes=nbytes)
        for at, nbytes in ((2, 10), (1, 5), (2, -5), (3, 1))
    ]
    (level,) = levels(profile_of(records))
    assert (level.at.tolist(), level.nbytes.tolist()) == ([1, 2, 3], [5, 10, 11])


@pytest.mark.parametrize("profile", profiles())
def test_speedscope_opens_and_closes_frames_in_order(profile: Profile) -> None:
    file = io.BytesIO()
    write_speedscope(profile, file)
    document = json.loads(file.getvalue())
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = document["shared"]["frames"]
    opened = 0
    for lane in document["profiles"]:
        assert (lane["type"], lane["unit"]) == ("evented", "nanoseconds")
        stack = []
        at = lane["startValue"]
        for event in lane["events"]:
            assert at <= event["at"] <= lane["endValue"]
            at = event["at"]
            if event["type"] == "O":
                stack.append(event["frame"])
                opened += 1
                assert frames[event["frame"]]["name"]
            else:
                assert stack.pop() == event["frame"]
        assert not stack
    assert opened == len(profile[Compute])


def test_speedscope_tells_backward_from_forward() -> None:
    file = io.BytesIO()
    write_speedscope(rich(), file)
    names = [frame["name"] for frame in json.loads(file.getvalue())["shared"]["frames"]]
    assert names == ["(root)", "layers.0", "layers.1 (backward)", "layers.2", "layers.3"]


def test_csv_has_a_file_per_kind_with_names_for_numbers() -> None:
    file = io.BytesIO()
    profile = rich()
    write_csv(profile, file)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        sheets = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {f"{kind.__name__.lower()}.csv" for kind in RECORDS} <= sheets.keys()
    rows = list(csv.DictReader(io.StringIO(sheets["transfer.csv"])))
    assert len(rows) == len(profile[Transfer])
    assert (rows[0]["link"], rows[0]["cause"], rows[0]["parent"]) == ("disk_read", "prefetch", "")
    assert (rows[1]["link"], rows[1]["parent"]) == ("h2d", "0")
    (mark,) = csv.DictReader(io.StringIO(sheets["mark.csv"]))
    assert (mark["kind"], mark["block"]) == ("note", "")
    blocks = list(csv.DictReader(io.StringIO(sheets["blocks.csv"])))
    assert (blocks[0]["name"], blocks[0]["home"]) == ("layers.0", "disk")
    assert json.loads(sheets["header.json"])["run"] == "0123456789abcdef"


def test_csv_of_one_profile_is_always_the_same() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    write_csv(rich(), first)
    write_csv(rich(), second)
    assert first.getvalue() == second.getvalue()


def native(profile: Profile) -> bytes:
    file = io.BytesIO()
    write_perfetto(profile, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("profile", profiles())
def test_perfettos_own_schema_reads_the_native_trace(profile: Profile) -> None:
    schema = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="the package perfetto is not installed"
    )
    raw = gzip.decompress(native(profile))
    trace = schema.Trace.FromString(raw)
    trace.DiscardUnknownFields()
    assert trace.ByteSize() == len(raw)  # there were none
    tracks: dict[int, str] = {}
    stacks: dict[int, list[int]] = defaultdict(list)
    slices: dict[str, int] = defaultdict(int)
    at = 0
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        if packet.HasField("track_descriptor"):
            assert packet.track_descriptor.uuid not in tracks
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor.name
            continue
        assert packet.timestamp >= at
        at = packet.timestamp
        event = packet.track_event
        name = tracks[event.track_uuid]
        if event.type == schema.TrackEvent.TYPE_SLICE_BEGIN:
            slices[name] += 1
            stacks[event.track_uuid].append(at)
            if not name.startswith("compute"):
                assert len(stacks[event.track_uuid]) == 1  # requests never overlap on a track
        elif event.type == schema.TrackEvent.TYPE_SLICE_END:
            stacks[event.track_uuid].pop()
        else:
            assert event.type in (schema.TrackEvent.TYPE_COUNTER, schema.TrackEvent.TYPE_INSTANT)
    assert not any(stacks.values())
    for link in Link:
        assert slices[link.name.lower()] == int((profile[Transfer].link == link).sum())
    assert slices["waits"] == len(profile[Wait])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hops_of_a_journey_share_a_flow() -> None:
    schema = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="the package perfetto is not installed"
    )
    trace = schema.Trace.FromString(gzip.decompress(native(rich())))
    flows = defaultdict(list)
    for packet in trace.packet:
        for flow in packet.track_event.flow_ids:
            flows[flow].append(list(packet.track_event.categories))
    assert len(flows) == 6
    assert all(found == [["disk_read"], ["h2d"]] for found in flows.values())


@pytest.mark.parametrize("write", [write_chrome, write_perfetto])
def test_perfettos_trace_processor_reads_it(write: Any, tmp_path: Path) -> None:
    api = pytest.importorskip("perfetto.trace_processor", reason="the package perfetto is not installed")
    binary = shutil.which("trace_processor_shell") or shutil.which("trace_processor")
    if binary is None:
        pytest.skip("trace_processor_shell is not on the PATH, and the package would fetch it from the network")
    profile = rich()
    path = tmp_path / "trace.gz"
    with path.open("wb") as file:
        write(profile, file)
    with api.TraceProcessor(trace=str(path), config=api.TraceProcessorConfig(bin_path=binary)) as processor:
        (problems,) = processor.query("select sum(value) as n from stats where severity = 'error'")
        assert not problems.n
        (found,) = processor.query("select count(*) as n from slice")
        marks = 1
        assert found.n == len(profile[Compute]) + len(profile[Transfer]) + len(profile[Wait]) + marks
