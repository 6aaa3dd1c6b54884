"""Files of profiles that are cut, damaged, foreign or hostile, and runs that are killed, fork, or fill the disk."""

import errno
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.memory.errors import DiskError, ProfileError, UsageError
from penstock.runtime.profiler import reader as reader_module
from penstock.runtime.profiler.profile import Columns
from penstock.runtime.profiler.reader import follow, read_profile
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import MAJOR, Footer, Gauge, Header, Meter
from penstock.runtime.profiler.segments import LIMIT_NBYTES, MAGIC, PREFIX, Segment, decode, encode
from penstock.runtime.profiler.writer import ProfileWriter

COUNT = 6
EACH = 50
NEVER_S = 1e6
HEADER = Header(
    run="cafe",
    level="light",
    began_ns=0,
    began_unix_s=0.0,
    argv=("train.py",),
    versions={},
    machine={},
    capacities={},
    budgets={},
    peaks={},
)


def gauge(at: int) -> Gauge:
    return Gauge(at=at, meter=Meter.HOST_RSS, value=at)


def segment(number: int) -> bytes:
    """One of the segments of a run: records number × EACH and those after it."""
    first = number * EACH
    columns = Columns.of(Gauge, [gauge(i) for i in range(first, first + EACH)])
    footer = Footer(written_ns=number, recorded=first + EACH, dropped=0, own_ns=0, last=number == COUNT - 1)
    return encode(Segment(header=HEADER, footer=footer, columns={Gauge: columns}))


SEGMENTS = tuple(segment(number) for number in range(COUNT))
WHOLE = b"".join(SEGMENTS)
STARTS = tuple(sum(map(len, SEGMENTS[:i])) for i in range(COUNT + 1))


def read(path: Path, data: bytes) -> tuple[list[int], tuple[str, ...]]:
    path.write_bytes(data)
    found = read_profile(path)
    return found[Gauge].at.tolist(), found.problems


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ProfileError, match=match) as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.prof"


def test_a_whole_file_has_no_problems(path: Path) -> None:
    assert read(path, WHOLE) == (list(range(COUNT * EACH)), ())


@pytest.mark.parametrize("segments", range(1, COUNT))
@pytest.mark.parametrize("extra", [0, 1, len(MAGIC), PREFIX.size - 1, PREFIX.size, PREFIX.size + 1, -1])
def test_a_cut_end_costs_only_the_last_segment(path: Path, segments: int, extra: int) -> None:
    end = STARTS[segments] + (extra if extra >= 0 else len(SEGMENTS[segments]) - 1)
    found, problems = read(path, WHOLE[:end])
    assert found == list(range(segments * EACH))
    left = end - STARTS[segments]
    if left:
        assert problems == (
            f"the end is cut off or damaged: the last {left} bytes, from byte {STARTS[segments]} on, cannot be read",
        )
    else:
        assert problems == ()


@pytest.mark.parametrize("left", [1, len(MAGIC), PREFIX.size, PREFIX.size + 1, len(SEGMENTS[0]) - 1])
def test_a_file_cut_in_its_first_segment_is_refused(path: Path, left: int) -> None:
    refused(path, WHOLE[:left], "it is damaged, and no segment of it is whole")


def test_a_flipped_byte_costs_only_its_segment(path: Path) -> None:
    chance = random.Random(1)
    for number in range(COUNT):
        start, end = STARTS[number], STARTS[number + 1]
        for position in [*range(start, start + PREFIX.size), *chance.sample(range(start, end), 8)]:
            data = bytearray(WHOLE)
            data[position] ^= 1 << chance.randrange(8)
            found, problems = read(path, bytes(data))
            lost = set(range(number * EACH, (number + 1) * EACH))
            assert found == [i for i in range(COUNT * EACH) if i not in lost]
            if number == COUNT - 1:
                assert problems[0].startswith("the end is cut off or damaged")
            else:
                assert f"from byte {start} on are damaged" in problems[0]
                assert problems[1:] == (f"{EACH} of {COUNT * EACH} records are missing",)


@pytest.mark.parametrize("rubbish", [b"x", b"\0" * 5000, MAGIC[:-1], MAGIC, b"PK\3\4" * 400_000])
def test_rubbish_between_segments_is_passed_over(path: Path, rubbish: bytes) -> None:
    for data in (rubbish + WHOLE, SEGMENTS[0] + rubbish + b"".join(SEGMENTS[1:]), WHOLE + rubbish):
        found, problems = read(path, data)
        assert found == list(range(COUNT * EACH))
        assert len(problems) >= 1


def test_a_segment_that_is_missing_is_missed(path: Path) -> None:
    found, problems = read(path, SEGMENTS[0] + b"".join(SEGMENTS[2:]))
    assert len(found) == (COUNT - 1) * EACH
    assert problems == (f"{EACH} of {COUNT * EACH} records are missing",)


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b'{"traceEvents": []}',
        b"PK\x03\x04" + bytes(100),
        b"\x1f\x8b\x08" + bytes(30),
        bytes(3_000_000),
        MAGIC[1:],
    ],
)
def test_foreign_files_are_refused(path: Path, data: bytes) -> None:
    refused(path, data, "is not a profile")
    with pytest.raises(ProfileError, match="is not a profile"):
        follow(path, 0)


def test_an_empty_file_is_refused(path: Path) -> None:
    refused(path, b"", "is empty")
    assert follow(path, 0) == (None, 0)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for where, match in ((tmp_path, "is a folder"), (pipe, "is not a plain file"), (Path("/dev/zero"), "not a plain")):
        with pytest.raises(ProfileError, match=match):
            read_profile(where)
    with pytest.raises(UsageError, match="is not a plain file"):
        ProfileWriter(pipe, HEADER, Ring(), {}, force=True)
    with pytest.raises(ProfileError, match="cannot open"):
        read_profile("a\0b")


def sealed(payload: bytes, *, major: int = MAJOR, minor: int = 0) -> bytes:
    prefix = PREFIX.pack(MAGIC, major, minor, len(payload), len(zlib.decompress(payload)), 0)[:-4]
    return prefix + struct.pack("<I", zlib.crc32(payload, zlib.crc32(prefix))) + payload


def test_newer_major_versions_are_refused_naming_both(path: Path) -> None:
    newer = sealed(SEGMENTS[0][PREFIX.size :], major=MAJOR + 1, minor=4)
    for data in (newer, newer * 3, newer[:-5], newer[: PREFIX.size]):
        refused(path, data, rf"version {MAJOR + 1}\.4 .* up to {MAJOR}\.x")
    path.write_bytes(newer)
    with pytest.raises(ProfileError, match=rf"version {MAJOR + 1}\.4"):
        follow(path, 0)


def test_newer_minor_versions_are_read(path: Path) -> None:
    payload: dict[str, Any] = msgspec.msgpack.decode(zlib.decompress(SEGMENTS[0][PREFIX.size :]), strict=False)
    payload["header"]["weather"] = "fine"
    payload["columns"]["Gauge"]["fields"]["unit"] = payload["columns"]["Gauge"]["fields"]["at"]
    payload["columns"]["Weather"] = payload["columns"]["Gauge"]
    data = sealed(zlib.compress(msgspec.msgpack.encode(payload)), minor=9)
    assert read(path, data) == (list(range(EACH)), ())


@pytest.mark.parametrize(("stored", "inflated"), [(LIMIT_NBYTES + 1, 10), (2**32 - 1, 2**32 - 1), (100, LIMIT_NBYTES)])
def test_lengths_are_checked_before_anything_is_allocated(path: Path, stored: int, inflated: int) -> None:
    lie = PREFIX.pack(MAGIC, MAJOR, 0, stored, inflated, 0) + bytes(200)
    refused(path, lie, "is damaged")
    found, problems = read(path, lie + WHOLE)
    assert len(found) == COUNT * EACH
    assert "bytes were to follow" in problems[0]


def test_a_file_full_of_beginnings_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look(data: bytes) -> Segment:
        looks.append(len(data))
        return decode(data)

    monkeypatch.setattr(reader_module, "decode", look)
    beginning = PREFIX.pack(MAGIC, MAJOR, 0, 200_000, 200_000, 0)
    refused(path, beginning * 30_000, "is damaged")
    assert len(looks) <= 101
    path.write_bytes(SEGMENTS[0] + beginning * 30_000)
    assert "too much is damaged" in read_profile(path).problems[-1]


def test_no_damage_ends_in_anything_but_an_error_of_ours(path: Path) -> None:
    chance = random.Random(7)
    for _ in range(150):
        data = bytearray(b"".join(chance.choices(SEGMENTS, k=3)))
        for _ in range(chance.randrange(1, 30)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
        path.write_bytes(data)
        for look in (read_profile, lambda path: follow(path, 0)):
            try:
                look(path)
            except ProfileError as error:
                assert "\n" not in str(error)  # noqa: PT017 (most of the damage is survived)


SCRIPT = """
import sys, time
from pathlib import Path
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import Gauge, Header, Meter
from penstock.runtime.profiler.writer import ProfileWriter
header = Header(run="cafe", level="light", began_ns=0, began_unix_s=0.0, argv=(), versions={}, machine={},
                capacities={}, budgets={}, peaks={})
ring = Ring()
writer = ProfileWriter(sys.argv[1], header, ring, {}, interval_s=0.05)
assert "torch" not in sys.modules and "transformers" not in sys.modules
for number in range(10**9):
    ring.append(Gauge(at=time.monotonic_ns(), meter=Meter.HOST_RSS, value=number))
    time.sleep(0.0005)
"""


def test_a_killed_run_loses_no_more_than_an_interval(path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() or path.stat().st_size < 5000:
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed_ns = time.monotonic_ns()
        running.send_signal(signal.SIGKILL)
        running.wait()
    found = read_profile(path)
    values = found[Gauge].value.tolist()
    assert values == list(range(len(values)))
    assert not found.footer.last
    assert all("the end is cut off" in problem for problem in found.problems)
    assert killed_ns - int(found[Gauge].at[-1]) < 1e9


# Python 3.12 warns of forks in a process with threads, which is what is tested.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_write_into_its_parents_file(path: Path) -> None:
    ring = Ring()
    running = ProfileWriter(path, HEADER, ring, {}, interval_s=NEVER_S)
    for at in range(3):
        ring.append(gauge(at))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ring.append(gauge(99))
            assert ring.statistics().waiting == 1
            assert running.close("child").nbytes == path.stat().st_size
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert path.stat().st_size == running.statistics().nbytes
    ring.append(gauge(3))
    running.close()
    found = read_profile(path)
    assert (found[Gauge].at.tolist(), found.footer.failure, found.problems) == ([0, 1, 2, 3], "", ())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told_in_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DiskError, match="Permission denied") as caught:
            ProfileWriter(tmp_path / "p", HEADER, Ring(), {})
    finally:
        tmp_path.chmod(0o700)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(DiskError, match=rf"cannot make .*{os.strerror(code)}") as caught:
            ProfileWriter(path, HEADER, Ring(), {})
    assert "\n" not in str(caught.value)


def filling(room: Callable[[], int]) -> Callable[[int, Sequence[memoryview], int], int]:
    """A pwrite on a disk of `room()` bytes, which writes what fits and then fails."""
    pwrite = os.pwrite

    def write(fd: int, data: bytes, offset: int) -> int:
        fits = min(len(data), room() - offset)
        if fits <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[:fits], offset)

    return write  # type: ignore[return-value]


@pytest.mark.parametrize("cut", [True, False], ids=["cut back", "cannot be cut back"])
def test_a_full_disk_costs_records_and_not_the_run(
    path: Path, cut: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring = Ring()
    running = ProfileWriter(path, HEADER, ring, {}, interval_s=NEVER_S)
    before = path.stat().st_size
    room = before + 300

    def record(first: int) -> None:
        for at in range(first, first + 1000):
            ring.append(gauge(at**3 % 1_000_003))
        running._write(last=False)

    monkeypatch.setattr(os, "pwrite", filling(lambda: room))
    if not cut:
        monkeypatch.setattr(os, "ftruncate", lambda fd, size: filling(lambda: 0)(fd, (), 0))
    with caplog.at_level(logging.WARNING):
        record(0)
        record(1000)
        assert [entry.getMessage() for entry in caplog.records] == [
            f"cannot write {path}: No space left on device. The run goes on; records are lost."
        ]
        if cut:
            assert path.stat().st_size == before
        room = 10**9
        record(2000)
        done = running.close()
    assert (done.recorded, done.dropped) == (3000, 2000)
    assert "No space left on device" in done.failure
    assert "2000 of 3000 records are lost" in caplog.records[-1].getMessage()
    found = read_profile(path)
    assert (len(found[Gauge]), found.footer.recorded, found.footer.dropped) == (1000, 3000, 2000)
    assert (found.footer.last, found.problems) == (True, ())


def test_a_disk_that_stays_full_leaves_what_was_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    running = ProfileWriter(path, HEADER, ring, {}, interval_s=NEVER_S)
    ring.append(gauge(1))
    running._write(last=False)
    size = path.stat().st_size
    monkeypatch.setattr(os, "pwrite", filling(lambda: size + 10))
    ring.append(gauge(2))
    done = running.close()
    assert (done.recorded, done.dropped) == (2, 1)
    found = read_profile(path)
    assert (found[Gauge].at.tolist(), found.footer.last, found.problems) == ([1], False, ())


def test_a_disk_that_is_full_from_the_start_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", filling(lambda: 0))
    with pytest.raises(DiskError, match="No space left on device"):
        ProfileWriter(path, HEADER, Ring(), {})
    assert not path.exists()
