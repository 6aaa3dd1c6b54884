"""The disk engine against plain reads and writes: odd sizes at odd places, page cache, failures, order, and its end."""

import ctypes
import errno
import itertools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, HostArena, round_up
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import ClosedError, DiskError
from penstock.memory.files import FileTable, OpenFile
from penstock.memory.image import Bounce, Window, build_image
from penstock.memory.layout import FileSpan, TensorSource
from penstock.memory.throttle import Throttle
from penstock.memory.transfer import Transfer

SIZE = 61 * PAGE + 1234
WAIT_S = 20.0


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    return path


@pytest.fixture
def arena() -> Iterator[HostArena]:
    made = HostArena(64 * PAGE)
    yield made
    made.close()


def buffered(path: str, flags: int, mode: int) -> int:
    """An open() of a filesystem that refuses O_DIRECT."""
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return os.open(path, flags, mode)


def window(path: object, start: int, stop: int, *, offset: int = 0) -> Window:
    """The window that holds bytes `start` to `stop` of a file."""
    source = TensorSource(
        shape=(stop - start,), dtype="U8", spans=(FileSpan(path=str(path), offset=start, nbytes=stop - start),)
    )
    if stop - start < 16 * 1024:
        source = TensorSource(
            shape=(16 * 1024,), dtype="U8", spans=(FileSpan(path=str(path), offset=start, nbytes=16 * 1024),)
        )
    (made,) = build_image([("t", source, "U8")]).windows
    assert offset == 0
    return made


def bounce(path: object, start: int, nbytes: int, *, offset: int = 0) -> Bounce:
    return Bounce(path=str(path), file_offset=start, nbytes=nbytes, offset=offset, source_dtype="U8", target_dtype="U8")


def finish(transfer: Transfer) -> None:
    assert transfer.wait(WAIT_S), "the transfer hangs"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    threads=st.integers(1, 4),
    chunk=st.sampled_from([PAGE, 3 * PAGE, 16 * PAGE, 1 << 20]),
    staging=st.sampled_from([PAGE, 2 * PAGE, 1 << 20]),
    direct=st.booleans(),
    places=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 20 * PAGE)), min_size=1, max_size=5),
)
def test_any_bytes_of_a_file(
    file: Path,
    content: bytes,
    threads: int,
    chunk: int,
    staging: int,
    direct: bool,
    places: list[tuple[int, int]],
) -> None:
    places = [(start, min(nbytes, SIZE - start)) for start, nbytes in places]
    arena = HostArena(sum(nbytes for _, nbytes in places) + PAGE)
    files = FileTable() if direct else FileTable(open_file=buffered)
    engine = DiskEngine(threads=threads, chunk_nbytes=chunk, staging_nbytes=staging, files=files)
    into = arena.view(0, arena.nbytes)
    ranges: list[tuple[int, int]] = []
    try:
        bounces, at = [], 1  # odd places in memory too
        for start, nbytes in places:
            bounces.append(bounce(file, start, nbytes, offset=at))
            at += nbytes
        finish(engine.read([], bounces, into, on_data=lambda a, b: ranges.append((a, b))))
    finally:
        engine.close()
    assert bytes(into[1:at]) == b"".join(content[start : start + nbytes] for start, nbytes in places)
    assert into[0] == 0
    assert not any(into[at:])
    assert [a for a, _ in sorted(ranges)] == [1, *[b for _, b in sorted(ranges)][:-1]]  # every byte told once
    arena.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chunk", [PAGE, 5 * PAGE, 1 << 22])
@pytest.mark.parametrize(("start", "stop"), [(0, 20000), (4095, 60001), (SIZE - 40000, SIZE), (8192, 8192 + 16384)])
def test_windows(file: Path, content: bytes, arena: HostArena, start: int, stop: int, chunk: int, direct: bool) -> None:
    engine = DiskEngine(threads=3, chunk_nbytes=chunk, files=FileTable() if direct else FileTable(open_file=buffered))
    made = window(file, start, stop)
    into = arena.view(0, arena.nbytes)
    told: list[tuple[int, int]] = []
    finish(engine.read([made], [], into, on_data=lambda a, b: told.append((a, b))))
    assert bytes(into[made.final_offset : made.final_offset + stop - start]) == content[start:stop]
    told.sort()
    assert told[0][0] == made.data_offset
    assert told[-1][1] == made.data_offset + made.data_nbytes
    assert all(before[1] == after[0] for before, after in itertools.pairwise(told))
    statistics = engine.statistics()
    assert statistics.read_nbytes == made.nbytes
    assert statistics.reads == -(-made.nbytes // chunk) == len(told)
    assert (statistics.writes, statistics.written_nbytes, statistics.queued) == (0, 0, 0)
    engine.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chunk", [PAGE, 3 * PAGE, 1 << 22])
def test_writes_at_any_page(tmp_path: Path, arena: HostArena, chunk: int, direct: bool) -> None:
    engine = DiskEngine(threads=2, chunk_nbytes=chunk, files=FileTable() if direct else FileTable(open_file=buffered))
    data = os.urandom(7 * PAGE)
    arena.view(0, len(data))[:] = data
    path = tmp_path / "scratch"
    finish(engine.write(str(path), 5 * PAGE, arena.view(0, 7 * PAGE)))
    finish(engine.write(str(path), 0, arena.view(PAGE, PAGE)))
    assert path.read_bytes() == data[PAGE : 2 * PAGE] + bytes(4 * PAGE) + data
    assert path.stat().st_mode & 0o777 == 0o600
    assert engine.statistics().written_nbytes == 8 * PAGE
    finish(engine.read([window(path, 5 * PAGE, 12 * PAGE)], [], arena.view(20 * PAGE, 8 * PAGE)))
    assert bytes(arena.view(20 * PAGE, 7 * PAGE)) == data
    engine.close()


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as area:
        pages = -(-len(area) // PAGE)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        base = libc.mmap(None, len(area), mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
        seen = (ctypes.c_ubyte * pages)()
        assert libc.mincore(base, len(area), seen) == 0
        libc.munmap(base, len(area))
        return sum(page & 1 for page in seen)


def forget_pages(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_buffered_reads_leave_the_page_cache_clean(
    file: Path, content: bytes, arena: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    assert cached_pages(file) > 0  # it has just been written: the probe sees that
    forget_pages(file)
    if cached_pages(file):
        pytest.skip("pages of this filesystem cannot be dropped (tmpfs)")
    engine = DiskEngine(threads=2, chunk_nbytes=3 * PAGE, files=FileTable(open_file=buffered))
    with caplog.at_level(logging.WARNING):
        for start, stop in [(0, 5 * PAGE), (17 * PAGE + 5, 40 * PAGE)]:
            finish(engine.read([window(file, start, stop)], [bounce(file, 9999, 5)], arena.view(0, 32 * PAGE)))
    assert cached_pages(file) == 0
    assert [record.message for record in caplog.records if "O_DIRECT" in record.message] == [caplog.messages[0]]
    engine.close()


def test_buffered_writes_leave_the_page_cache_clean(tmp_path: Path, arena: HostArena) -> None:
    path = tmp_path / "scratch"
    engine = DiskEngine(threads=2, chunk_nbytes=PAGE, files=FileTable(open_file=buffered))
    arena.poison(arena.cut(8 * PAGE))
    finish(engine.write(str(path), 0, arena.view(0, 8 * PAGE)))
    left = cached_pages(path)
    forget_pages(path)
    if cached_pages(path):
        pytest.skip("pages of this filesystem cannot be dropped (tmpfs)")
    assert left <= 2, "but for pages that a processor has not put on its lists yet: the kernel keeps those"
    engine.close()


def test_direct_reads_never_enter_the_page_cache(file: Path, arena: HostArena) -> None:
    forget_pages(file)
    engine = DiskEngine(threads=2)
    if not engine.files.get(str(file)).direct or cached_pages(file):
        engine.close()
        pytest.skip("this filesystem refuses O_DIRECT")
    finish(engine.read([window(file, 0, SIZE)], [], arena.view(0, 64 * PAGE)))
    assert cached_pages(file) == 0
    engine.close()


def test_shared_memory_filesystem(content: bytes, arena: HostArena) -> None:
    path = Path("/dev/shm") / f"penstock-test-{os.getpid()}"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        pytest.skip("no /dev/shm here")
    try:
        path.write_bytes(content)
        engine = DiskEngine(threads=2, chunk_nbytes=4 * PAGE)
        made = window(path, 4097, SIZE)
        into = arena.view(0, 64 * PAGE)
        finish(engine.read([made], [], into))
        assert bytes(into[made.final_offset : made.final_offset + SIZE - 4097]) == content[4097:]
        engine.close()
    finally:
        path.unlink(missing_ok=True)


def test_o_direct_refused_only_when_reading(
    file: Path, content: bytes, arena: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    """Some filesystems grant O_DIRECT at open and refuse each request."""
    table = FileTable()

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if table.get(str(file)).direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(fd, buffers, offset)

    engine = DiskEngine(threads=4, chunk_nbytes=4 * PAGE, files=table, pread=pread)
    made = window(file, 100, SIZE)
    into = arena.view(0, 64 * PAGE)
    with caplog.at_level(logging.WARNING):
        finish(engine.read([made], [], into))
    assert bytes(into[made.final_offset : made.final_offset + SIZE - 100]) == content[100:]
    assert table.get(str(file)).direct is False
    assert sum("O_DIRECT" in message for message in caplog.messages) == 1
    engine.close()


# --- failures -----------------------------------------------------------------------------------------------------


def failing(nth: int, code: int) -> Callable[[int, Sequence[memoryview], int], int]:
    """A preadv that fails on its n-th call, counted from 0."""
    calls = iter(range(10**9))

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) == nth:
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, buffers, offset)

    return pread


@pytest.mark.parametrize("nth", [0, 1, 5, 15])
def test_an_error_of_the_drive_names_everything(file: Path, arena: HostArena, nth: int) -> None:
    engine = DiskEngine(threads=1, chunk_nbytes=4 * PAGE, pread=failing(nth, errno.EIO))
    made = window(file, 0, SIZE)
    transfer = engine.read([made], [], arena.view(0, 64 * PAGE))
    with pytest.raises(DiskError) as caught:
        transfer.wait(WAIT_S)
    message = str(caught.value)
    assert f"at offset {nth * 4 * PAGE} of {file}" in message
    assert "Input/output error" in message
    assert "dmesg" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, OSError)
    assert transfer.done()
    assert engine.statistics().reads == nth  # what had not started was skipped
    finish(engine.read([made], [], arena.view(0, 64 * PAGE)))  # the engine still works
    engine.close()


def test_one_request_fails_and_the_others_do_not(file: Path, content: bytes, arena: HostArena) -> None:
    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 8 * PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, buffers, offset)

    engine = DiskEngine(threads=4, chunk_nbytes=4 * PAGE, pread=pread)
    good = engine.read([window(file, 20 * PAGE, 40 * PAGE)], [], arena.view(0, 20 * PAGE))
    bad = engine.read([window(file, 0, 20 * PAGE)], [], arena.view(20 * PAGE, 20 * PAGE))
    finish(good)
    with pytest.raises(DiskError):
        bad.wait(WAIT_S)
    assert bytes(arena.view(0, 20 * PAGE)) == content[20 * PAGE : 40 * PAGE]
    engine.close()


def test_any_failure_of_a_callback_surfaces(file: Path, arena: HostArena) -> None:
    def told(start: int, stop: int) -> None:
        raise ZeroDivisionError

    engine = DiskEngine(threads=2)
    with pytest.raises(ZeroDivisionError):
        engine.read([window(file, 0, SIZE)], [], arena.view(0, 64 * PAGE), on_data=told).wait(WAIT_S)
    finish(engine.read([window(file, 0, SIZE)], [], arena.view(0, 64 * PAGE)))
    engine.close()


def test_a_missing_file(tmp_path: Path, arena: HostArena) -> None:
    engine = DiskEngine(threads=1)
    with pytest.raises(DiskError, match=r"gone\.bin.*No such file.*moved or deleted"):
        engine.read([window(tmp_path / "gone.bin", 0, 20000)], [], arena.view(0, 64 * PAGE))
    engine.close()


# --- order, handles, drives ---------------------------------------------------------------------------------------


class Gate:
    """A preadv that lets calls through one at a time, and remembers their offsets."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.entered.release()
        assert self.open.acquire(timeout=WAIT_S)
        return os.preadv(fd, buffers, offset)


def test_urgent_requests_overtake(file: Path, arena: HostArena) -> None:
    gate = Gate()
    engine = DiskEngine(threads=1, chunk_nbytes=4 * PAGE, pread=gate.pread)
    slow = engine.read([window(file, 0, 16 * PAGE)], [], arena.view(0, 16 * PAGE))
    assert gate.entered.acquire(timeout=WAIT_S)
    assert engine.statistics().queued == 3
    fast = engine.read([window(file, 20 * PAGE, 28 * PAGE)], [], arena.view(16 * PAGE, 8 * PAGE), urgent=True)
    assert (slow.done(), fast.done()) == (False, False)
    assert not fast.wait(0.01)
    gate.open.release(100)
    finish(slow)
    finish(fast)
    assert [offset // PAGE for offset in gate.offsets] == [0, 20, 24, 4, 8, 12]
    engine.close()


def test_cancel_skips_what_has_not_started(file: Path, arena: HostArena) -> None:
    gate = Gate()
    engine = DiskEngine(threads=1, chunk_nbytes=4 * PAGE, pread=gate.pread)
    told: list[Transfer] = []
    transfer = engine.read([window(file, 0, 16 * PAGE)], [], arena.view(0, 16 * PAGE))
    transfer.add_done_callback(told.append)
    assert gate.entered.acquire(timeout=WAIT_S)
    transfer.cancel()
    assert not transfer.done()  # one chunk still writes to the slot
    gate.open.release(100)
    finish(transfer)
    assert transfer.error is None
    assert gate.offsets == [0]
    assert told == [transfer]
    transfer.add_done_callback(told.append)  # late ones are called at once
    assert told == [transfer, transfer]
    engine.close()


def test_close_lets_running_chunks_finish_and_cancels_the_rest(file: Path, arena: HostArena) -> None:
    gate = Gate()
    engine = DiskEngine(threads=2, chunk_nbytes=4 * PAGE, pread=gate.pread)
    transfer = engine.read([window(file, 0, 32 * PAGE)], [], arena.view(0, 32 * PAGE))
    for _ in range(2):
        assert gate.entered.acquire(timeout=WAIT_S)
    threading.Timer(0.05, gate.open.release, [100]).start()
    engine.close()
    assert transfer.done()
    assert transfer.cancelled
    assert len(gate.offsets) == 2
    with pytest.raises(ClosedError):
        engine.read([window(file, 0, 16 * PAGE)], [], arena.view(0, 16 * PAGE))
    engine.close()


def test_a_request_that_meets_the_close_does_not_hang(file: Path, arena: HostArena) -> None:
    """The engine may be closed between the look at its state and the queueing."""
    engine = DiskEngine(threads=1)
    finish(engine.read([window(file, 0, 20000)], [], arena.view(0, 64 * PAGE)))
    (drive,) = engine._drives.values()
    engine.close()
    transfer = Transfer(1)
    drive.put([(transfer, lambda worker: None)], False)
    with pytest.raises(ClosedError):
        transfer.wait(1.0)
    assert transfer.done()


def test_nothing_to_read_is_done_at_once(arena: HostArena) -> None:
    engine = DiskEngine(threads=1)
    transfer = engine.read([], [], arena.view(0, PAGE))
    assert transfer.done()
    assert transfer.wait(0)
    engine.close()


def test_many_requests_each_with_its_own_handle(file: Path, content: bytes, arena: HostArena) -> None:
    engine = DiskEngine(threads=4, chunk_nbytes=PAGE)
    spans = [(i * 5 * PAGE, i * 5 * PAGE + 16 * 1024) for i in range(11)]
    views = [arena.view(i * 5 * PAGE, 5 * PAGE) for i in range(11)]
    transfers = [engine.read([window(file, a, b)], [], view) for (a, b), view in zip(spans, views, strict=True)]
    for transfer, (a, b), view in zip(transfers, spans, views, strict=True):
        finish(transfer)
        assert bytes(view[: b - a]) == content[a:b]
    engine.close()


class TwoDrives(FileTable):
    """Pretends that each file lies on a drive of its own."""

    def get(self, path: str, *, writable: bool = False) -> OpenFile:
        file = super().get(path, writable=writable)
        file.device = hash(path)
        return file


def test_a_slow_drive_holds_nobody_up(tmp_path: Path, content: bytes, arena: HostArena) -> None:
    paths = [tmp_path / "slow", tmp_path / "fast"]
    for path in paths:
        path.write_bytes(content)
    table, go = TwoDrives(), threading.Event()

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd == table.get(str(paths[0])).fd:
            assert go.wait(WAIT_S)
        return os.preadv(fd, buffers, offset)

    engine = DiskEngine(threads=1, chunk_nbytes=4 * PAGE, files=table, pread=pread)
    slow = engine.read([window(paths[0], 0, 30 * PAGE)], [], arena.view(0, 30 * PAGE))
    fast = engine.read([window(paths[1], 0, 30 * PAGE)], [], arena.view(30 * PAGE, 30 * PAGE))
    finish(fast)
    assert not slow.done()
    both = engine.read([window(paths[1], 0, 20000)], [bounce(paths[0], 5, 7)], HostArena(64 * PAGE).buffer)
    go.set()
    finish(slow)
    finish(both)
    assert bytes(arena.view(0, 30 * PAGE)) == bytes(arena.view(30 * PAGE, 30 * PAGE)) == content[: 30 * PAGE]
    assert sum(t.name.startswith("penstock-disk") for t in threading.enumerate()) == 2
    engine.close()


def test_the_throttle_counts_whole_requests(file: Path, arena: HostArena) -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    engine = DiskEngine(threads=1, chunk_nbytes=4 * PAGE, throttle=Throttle(PAGE, clock=lambda: now[0], sleep=sleep))
    finish(engine.read([window(file, 0, 10 * PAGE)], [], arena.view(0, 10 * PAGE)))
    assert now[0] == 110.0
    arena.poison(arena.cut(PAGE))
    finish(engine.write(str(file), 0, arena.view(0, 2 * PAGE)))
    assert now[0] == 112.0
    engine.close()


def test_own_memory() -> None:
    assert DiskEngine.own_nbytes(1 << 20, threads=3) == 3 * ((1 << 20) + 2 * PAGE)
    assert DiskEngine.own_nbytes(1, threads=1) == round_up(1) + 2 * PAGE
