"""The disk probe against drives whose rates are known: exactly what they are, no wear, nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fakeclock import FakeClock

from penstock.memory.arena import HostArena
from penstock.memory.capacity import DiskCapacity
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DiskError, UsageError
from penstock.memory.requests import CHUNK
from penstock.runtime.calibration import diskload
from penstock.runtime.calibration.disk import DriveProbe, EngineMaker, drives_together
from penstock.runtime.calibration.diskload import AHEAD, PIECE, DiskLoad, ProbeFile, probe_file

MIB = 2**20
READ, WRITE, START = 2e9, 1e9, 50e-6


class FakeDrive:
    """Serves one request at a time: each takes a start and its bytes at a rate."""

    def __init__(self, clock: FakeClock, read: float = READ, write: float = WRITE) -> None:
        self.clock, self.rates = clock, (read, write)
        self.read_nbytes = self.written_nbytes = 0
        self._lock = threading.Lock()

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nbytes = sum(map(len, buffers))
        with self._lock:
            self.read_nbytes += nbytes
        self.clock.take(START + nbytes / self.rates[0])
        return nbytes

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nbytes = sum(map(len, buffers))
        with self._lock:
            self.written_nbytes += nbytes
        self.clock.take(START + nbytes / self.rates[1])
        return nbytes

    def engines(self, threads: int, chunk_nbytes: int) -> DiskEngine:
        return DiskEngine(
            threads=threads, chunk_nbytes=chunk_nbytes, finest_nbytes=chunk_nbytes, pread=self.pread, pwrite=self.pwrite
        )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def arena() -> Iterator[HostArena]:
    made = HostArena(AHEAD * PIECE)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> ProbeFile:
    path = tmp_path / "probe.bin"
    with open(path, "wb") as opened:
        opened.truncate(2 * PIECE)
    return ProbeFile(str(path), 2 * PIECE)


def expected(size: int, rate: float) -> float:
    return size / (START + size / rate)


def test_a_drive_is_what_it_is(clock: FakeClock, arena: HostArena, file: ProbeFile) -> None:
    drive = FakeDrive(clock)
    sizes = (256 * 1024, 4 * MIB, 8 * MIB)
    probe = DriveProbe(file=file, arena=arena, engines=drive.engines, clock=clock)
    found = probe.measure("it", seconds=0.1, sizes=sizes, depths=(1, 8), write_nbytes=128 * MIB, capacity_nbytes=7)
    for index, size in enumerate(sizes):
        assert found.read.y[index] == pytest.approx(expected(size, READ))
        assert found.write.y[index] == pytest.approx(expected(size, WRITE))
    assert max(found.read.spread) == pytest.approx(0, abs=1e-9)
    assert found.read_depth is not None
    assert found.read_depth.x == (1.0, 8.0)
    assert found.read_depth.y == pytest.approx([expected(CHUNK, READ)] * 2)  # it serves one at a time
    assert found.mixed == pytest.approx(1.0)  # and takes turns
    assert found.latency_s == pytest.approx(START + 4096 / READ)
    assert (found.name, found.capacity_nbytes) == ("it", 7)


@pytest.mark.parametrize("write_nbytes", [0, 100 * MIB, 768 * MIB])
def test_wear_is_bounded(clock: FakeClock, arena: HostArena, file: ProbeFile, write_nbytes: int) -> None:
    drive = FakeDrive(clock)
    probe = DriveProbe(file=file, arena=arena, engines=drive.engines, clock=clock)
    probe.measure("it", seconds=100.0, sizes=(CHUNK, 2 * CHUNK), depths=(1,), write_nbytes=write_nbytes)
    # Each size and the mix are measured once at least, and the first estimate is a piece of its own.
    assert drive.written_nbytes <= max(write_nbytes, 3 * PIECE) + PIECE


def test_a_drive_that_fails_says_so(clock: FakeClock, arena: HostArena, file: ProbeFile) -> None:
    def broken(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def engines(threads: int, chunk_nbytes: int) -> DiskEngine:
        return DiskEngine(threads=threads, chunk_nbytes=chunk_nbytes, pread=broken)

    with pytest.raises(DiskError, match=r"probe\.bin"):
        DriveProbe(file=file, arena=arena, engines=engines, clock=clock).measure("it", seconds=0.1)


def test_drives_that_share_a_bus(clock: FakeClock, arena: HostArena, tmp_path: Path) -> None:
    bus = FakeDrive(clock)
    files = []
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_bytes(bytes(4096))
        files.append(ProbeFile(str(path), 2 * PIECE))
    alone = expected(CHUNK, READ)
    engines: EngineMaker = bus.engines
    half = drives_together(files, arena, engines=engines, rates=(alone, alone), seconds=0.1, clock=clock)
    assert half == pytest.approx(0.5)
    assert drives_together(files, arena, engines=engines, rates=(1e8, 1e8), seconds=0.1, clock=clock) == 1.0


def test_the_probe_file_is_real_and_goes(arena: HostArena, tmp_path: Path) -> None:
    with probe_file(str(tmp_path), arena, nbytes=2 * PIECE) as file:
        path = Path(file.path)
        assert path.stat().st_size == file.nbytes == 2 * PIECE
        data = path.read_bytes()
        assert len(set(data[: 2**16])) == 256  # nothing that a drive could squeeze
        engine = DiskEngine()
        load = DiskLoad(engine, file, arena)
        load.read(PIECE)
        load.mix(2 * PIECE)
        assert engine.statistics().read_nbytes == engine.statistics().written_nbytes + PIECE == 2 * PIECE
        engine.close()
    assert list(tmp_path.iterdir()) == []


def space(free_nbytes: int, filesystem: str = "ext4") -> DiskCapacity:
    return DiskCapacity(
        folder="/data",
        total_nbytes=10**12,
        free_nbytes=free_nbytes,
        filesystem=filesystem,
        in_memory=filesystem == "tmpfs",
    )


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        (space(10**12, "tmpfs"), "/data is on tmpfs, which is memory"),
        (space(200 * MIB), "200 MiB free, and measuring its drive takes 256 MiB"),
    ],
)
def test_folders_that_will_not_do(
    arena: HostArena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: DiskCapacity, words: str
) -> None:
    monkeypatch.setattr(diskload, "disk_capacity", lambda folder: disk)
    with pytest.raises(UsageError, match=words), probe_file(str(tmp_path), arena):
        pass
    assert list(tmp_path.iterdir()) == []


def test_little_room_makes_a_smaller_file(arena: HostArena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskload, "disk_capacity", lambda folder: space(70 * 4 * MIB))
    with probe_file(str(tmp_path), arena) as file:
        assert os.stat(file.path).st_size == file.nbytes == 64 * MIB
