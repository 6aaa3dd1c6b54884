"""Writing a profile while it is recorded, and reading it back: whole, and as it grows."""

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from profiles import footer, header, profile_of, streamed

from penstock.memory.errors import DiskError, ProfileError, UsageError
from penstock.runtime.profiler import writer as writer_module
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.reader import follow, read_profile
from penstock.runtime.profiler.ring import RECORD_NBYTES, Ring
from penstock.runtime.profiler.schema import RECORDS, Compute, Gauge, Meter, Module, Phase, Record, fields_of
from penstock.runtime.profiler.segments import Segment, encode
from penstock.runtime.profiler.writer import ProfileWriter

NEVER_S = 1e6
TABLES: dict[str, dict[int, Any]] = {"modules": {}, "blocks": {}, "storages": {}, "strings": {}}


def gauge(at: int, value: int = 0) -> Gauge:
    return Gauge(at=at, meter=Meter.HOST_RSS, value=value)


def write(path: Path, *batches: Sequence[Record], ring: Ring | None = None, **options: Any) -> ProfileWriter:
    """A writer that has written one segment per batch, and has not been closed."""
    ring = ring or Ring()
    made = ProfileWriter(path, header(), ring, options.pop("tables", TABLES), interval_s=NEVER_S, **options)
    for batch in batches:
        for record in batch:
            ring.append(record)
        made._write(last=False)
    return made


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def values(profile: Profile) -> list[int]:
    found: list[int] = profile[Gauge].value.tolist()
    return found


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    wanted = streamed(5)
    records = [msgspec.convert(row, kind) for kind in RECORDS for row in wanted[kind].rows()]
    tables = {name: getattr(wanted, name) for name in TABLES}
    done = write(tmp_path / "run.prof", records[::2], records[1::2], tables=tables).close()
    found = read_profile(tmp_path / "run.prof")
    assert (found.header, found.problems) == (header(), ())
    assert (found.footer.recorded, found.footer.dropped, found.footer.last) == (len(records), 0, True)
    assert (done.recorded, done.dropped, done.segments, done.failure) == (len(records), 0, 4, "")
    assert done.nbytes == (tmp_path / "run.prof").stat().st_size
    for kind in RECORDS:
        first = fields_of(kind)
        rows = sorted(tuple(row[name] for name in first) for row in wanted[kind].rows())
        assert sorted(tuple(row[name] for name in first) for row in found[kind].rows()) == rows
    assert found.blocks == wanted.blocks
    assert found.modules == wanted.modules
    assert found.span() == wanted.span()


def test_records_are_sorted_by_time_and_else_stay_in_order(tmp_path: Path) -> None:
    write(tmp_path / "p", [gauge(5, 1), gauge(3, 2), gauge(5, 3)], [gauge(4, 4), gauge(5, 5)]).close()
    assert values(read_profile(tmp_path / "p")) == [2, 4, 1, 3, 5]


def test_an_empty_run_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "p").close("ValueError: no")
    found = read_profile(tmp_path / "p")
    assert [len(found[kind]) for kind in RECORDS] == [0] * len(RECORDS)
    assert (found.footer.last, found.footer.failure, found.problems) == (True, "ValueError: no", ())
    assert found.span() == (0, 0)


def test_a_run_can_be_read_from_its_first_moment(tmp_path: Path) -> None:
    running = write(tmp_path / "p")
    assert not read_profile(tmp_path / "p").footer.last
    running.close()


def test_the_thread_writes_by_itself(tmp_path: Path) -> None:
    ring = Ring()
    running = ProfileWriter(tmp_path / "p", header(), ring, TABLES, interval_s=0.01)
    ring.append(gauge(1))
    until(lambda: running.statistics().segments == 2)
    ring.append(gauge(2))
    until(lambda: running.statistics().segments == 3)
    assert len(read_profile(tmp_path / "p")[Gauge]) == 2
    ring.append(gauge(3))
    assert running.close().recorded == 3
    assert running.close() == running.close()
    assert len(read_profile(tmp_path / "p")[Gauge]) == 3


def test_a_ring_that_fills_fast_is_emptied_before_its_time(tmp_path: Path) -> None:
    ring = Ring(10 * RECORD_NBYTES)
    running = ProfileWriter(tmp_path / "p", header(), ring, TABLES, interval_s=2.0)
    began = time.monotonic()
    for value in range(6):
        ring.append(gauge(value))
    until(lambda: running.statistics().segments == 2)
    assert time.monotonic() - began < 1.9
    running.close()


def test_where_nothing_is_recorded_a_footer_is_written_now_and_then(tmp_path: Path) -> None:
    now = [0]
    running = write(tmp_path / "p", clock=lambda: now[0])
    for second in range(1, 10):
        now[0] = second * 10**9
        running._write(last=False)
    assert running.statistics().segments == 4
    assert read_profile(tmp_path / "p").footer.written_ns == 9 * 10**9
    running.close()


def test_what_the_ring_dropped_is_told(tmp_path: Path) -> None:
    ring = Ring(4 * RECORD_NBYTES)
    done = write(tmp_path / "p", [gauge(i) for i in range(10)], [gauge(10)], ring=ring).close()
    found = read_profile(tmp_path / "p")
    assert found.problems == ()
    assert (found.footer.recorded, found.footer.dropped) == (11, 6) == (done.recorded, done.dropped)
    assert found[Gauge].at.tolist() == [6, 7, 8, 9, 10]


def test_losses_are_exact_while_threads_record(tmp_path: Path) -> None:
    ring = Ring(2000 * RECORD_NBYTES)
    running = ProfileWriter(tmp_path / "p", header(), ring, TABLES, interval_s=0.01)

    def record() -> None:
        for value in range(10_000):
            ring.append(gauge(value))
            running.add_own_ns(10)

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = running.close()
    found = read_profile(tmp_path / "p")
    assert done.recorded == found.footer.recorded == 30_000
    assert done.dropped == found.footer.dropped == 30_000 - len(found[Gauge])
    assert found.problems == ()
    assert done.own_ns >= found.footer.own_ns > 300_000


def test_many_records_are_several_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MOST_RECORDS", 3)
    running = write(tmp_path / "p", [gauge(i) for i in range(7)])
    assert running.statistics().segments == 4
    running.close()
    assert read_profile(tmp_path / "p")[Gauge].at.tolist() == list(range(7))


def test_records_that_no_file_can_hold_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Record, frozen=True, kw_only=True):
        at: int

    bad: list[Any] = [gauge(2**63), gauge(1.5), gauge(None), Odd(at=1)]  # type: ignore[arg-type]
    done = write(tmp_path / "p", [gauge(1), *bad, gauge(2)], bad).close()
    found = read_profile(tmp_path / "p")
    assert found[Gauge].at.tolist() == [1, 2]
    assert (found.footer.recorded, found.footer.dropped) == (10, 8) == (done.recorded, done.dropped)
    assert "4 records" in done.failure
    assert found.problems == ()


def test_tables_may_grow_and_each_segment_has_what_it_needs(tmp_path: Path) -> None:
    tables: dict[str, dict[int, Any]] = {"modules": {0: Module(path="", kind="Model", parent=-1)}}
    running = write(tmp_path / "p", tables=tables)
    for number in (1, 2):
        tables["modules"][number] = Module(path=f"layers.{number}", kind="Layer", parent=0)
        running._ring.append(Compute(module=number, phase=Phase.FORWARD, start=number, end=number + 1))
        running._write(last=False)
    _, offset = follow(tmp_path / "p", 0)
    running._ring.append(Compute(module=2, phase=Phase.FORWARD, start=9, end=10))
    running.close()
    part, _ = follow(tmp_path / "p", offset)
    assert part is not None
    assert sorted(part.modules) == [0, 2]
    assert sorted(read_profile(tmp_path / "p").modules) == [0, 1, 2]


def test_what_becomes_known_of_the_machine_is_in_later_segments(tmp_path: Path) -> None:
    running = write(tmp_path / "p")
    running.header = header(peaks={"H2D": 1.0})
    running.close()
    assert read_profile(tmp_path / "p").header.peaks == {"H2D": 1.0}


def test_following_sees_every_record_once(tmp_path: Path) -> None:
    running = write(tmp_path / "p", [gauge(1)])
    seen, offset = [], 0
    for value in range(2, 6):
        part, offset = follow(tmp_path / "p", offset)
        assert part is not None
        seen += part[Gauge].at.tolist()
        assert follow(tmp_path / "p", offset) == (None, offset)
        running._ring.append(gauge(value))
        running._write(last=False)
    running.close()
    part, offset = follow(tmp_path / "p", offset)
    assert part is not None
    assert part.footer.last
    assert seen + part[Gauge].at.tolist() == [1, 2, 3, 4, 5]
    assert offset == (tmp_path / "p").stat().st_size


def test_following_waits_for_a_segment_that_is_half_written(tmp_path: Path) -> None:
    whole = encode(Segment(header=header(), footer=footer(), columns=profile_of([gauge(1)]).columns))
    path = tmp_path / "p"
    for left in (0, 1, 8, 23, 24, len(whole) - 1):
        path.write_bytes(whole[:left])
        assert follow(path, 0) == (None, 0)
        path.write_bytes(whole + whole[:left])
        part, offset = follow(path, 0)
        assert part is not None
        assert (part.problems, offset) == ((), len(whole))
        assert follow(path, offset) == (None, offset)


def test_following_starts_over_in_a_file_made_anew(tmp_path: Path) -> None:
    write(tmp_path / "p", [gauge(i) for i in range(5)]).close()
    _, offset = follow(tmp_path / "p", 0)
    running = write(tmp_path / "p", force=True)
    part, shorter = follow(tmp_path / "p", offset)
    assert part is not None
    assert shorter < offset
    running.close()


def test_what_takes_too_much_memory_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "p", *([gauge(i)] for i in range(10))).close()
    found = read_profile(tmp_path / "p", limit_nbytes=5 * 24)
    assert len(found[Gauge]) == 5
    assert found.problems == (
        "the last 5 of 10 records are left out: all take 240 bytes of memory, and 120 are allowed",
    )
    assert found.footer.last


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text("precious")
    with pytest.raises(UsageError, match=re.escape(f"{path} exists") + r".*--force \(force=True\)"):
        ProfileWriter(path, header(), Ring(), TABLES)
    assert path.read_text() == "precious"
    ProfileWriter(path, header(), Ring(), TABLES, force=True).close()
    assert read_profile(path).footer.last


def test_a_file_that_is_being_written_is_not_taken_over(tmp_path: Path) -> None:
    running = write(tmp_path / "p", [gauge(1)])
    with pytest.raises(UsageError, match="being written by another"):
        ProfileWriter(tmp_path / "p", header(), Ring(), TABLES, force=True)
    running.close()
    assert len(read_profile(tmp_path / "p")[Gauge]) == 1


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_refused(tmp_path: Path, force: bool) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        ProfileWriter(tmp_path, header(), Ring(), TABLES, force=force)
    with pytest.raises(DiskError, match="No such file or directory"):
        ProfileWriter(tmp_path / "none" / "p", header(), Ring(), TABLES, force=force)
    with pytest.raises(UsageError, match=r"/dev/null (exists|is not a plain file)"):
        ProfileWriter("/dev/null", header(), Ring(), TABLES, force=force)


def test_a_header_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ProfileWriter(tmp_path / "p", header(machine={"host": object()}), Ring(), TABLES)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_written_does_not_end_the_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables: dict[str, dict[int, Any]] = {"strings": {0: object()}, "modules": {7: object()}}
    with caplog.at_level(logging.WARNING):
        running = write(
            tmp_path / "p", [Compute(module=7, phase=Phase.FORWARD, start=0, end=1)], [gauge(1)], tables=tables
        )
        done = running.close()
    assert (done.recorded, done.dropped) == (2, 1)
    assert len(caplog.records) == 2
    found = read_profile(tmp_path / "p")
    assert (len(found[Gauge]), found.footer.dropped, found.problems) == (1, 1, ())


def test_segments_of_another_run_are_left_out(tmp_path: Path) -> None:
    parts = [
        encode(Segment(header=header(run=run), footer=footer(recorded=1), columns=profile_of([gauge(i)]).columns))
        for i, run in enumerate("aba")
    ]
    (tmp_path / "p").write_bytes(b"".join(parts))
    found = read_profile(tmp_path / "p")
    assert found[Gauge].at.tolist() == [0, 2]
    assert found.problems == ("1 segments are of another run and left out",)


def test_the_reader_knows_what_is_missing(tmp_path: Path) -> None:
    part = encode(
        Segment(header=header(), footer=footer(recorded=9, dropped=2), columns=profile_of([gauge(1)]).columns)
    )
    (tmp_path / "p").write_bytes(part)
    assert read_profile(tmp_path / "p").problems == ("6 of 7 records are missing",)


def test_a_missing_file_is_told_in_one_line(tmp_path: Path) -> None:
    for look in (read_profile, lambda path: follow(path, 0)):
        with pytest.raises(ProfileError, match=r"cannot open .*none: No such file") as caught:
            look(tmp_path / "none")
        assert "\n" not in str(caught.value)
