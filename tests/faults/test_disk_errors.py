"""Faults of files under the disk engine, as they happen: truncated, replaced, full, read-only, out of descriptors."""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from penstock.memory.arena import PAGE, HostArena
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DiskError
from penstock.memory.files import FileTable
from penstock.memory.image import Bounce, Image, build_image
from penstock.memory.layout import FileSpan, TensorSource

WAIT_S = 20.0
SIZE = 40 * PAGE + 777


@pytest.fixture
def arena() -> Iterator[HostArena]:
    made = HostArena(64 * PAGE)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    return path


def buffered(path: str, flags: int, mode: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return os.open(path, flags, mode)


def whole(path: Path) -> Image:
    source = TensorSource(shape=(SIZE,), dtype="U8", spans=(FileSpan(path=str(path), offset=0, nbytes=SIZE),))
    return build_image([("t", source, "U8")])


def failing(code: int, *, after: int = 0) -> Callable[[int, Sequence[memoryview], int], int]:
    """A preadv or pwritev that fails from a certain call on."""
    calls = iter(range(10**9))

    def transfer(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) < after:
            return os.pwritev(fd, buffers, offset)
        raise OSError(code, os.strerror(code))

    return transfer


def test_a_read_may_end_with_the_file(file: Path, arena: HostArena) -> None:
    engine = DiskEngine(threads=1, chunk_nbytes=8 * PAGE)
    image = whole(file)
    assert engine.read(image.windows, image.bounces, arena.view(0, 64 * PAGE)).wait(WAIT_S)
    assert bytes(arena.view(0, SIZE)) == file.read_bytes()
    assert engine.files.get(str(file)).direct in (True, False)
    engine.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 8 * PAGE, 8 * PAGE + 100, SIZE - 1])
def test_truncated_while_running(
    file: Path, arena: HostArena, left: int, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = DiskEngine(
        threads=1, chunk_nbytes=8 * PAGE, files=FileTable() if direct else FileTable(open_file=buffered)
    )
    image = whole(file)
    into = arena.view(0, 64 * PAGE)
    assert engine.read(image.windows, [], into).wait(WAIT_S)
    was_direct = engine.files.get(str(file)).direct
    caplog.clear()
    os.truncate(file, left)
    with caplog.at_level(logging.WARNING), pytest.raises(DiskError) as caught:
        engine.read(image.windows, [], into).wait(WAIT_S)
    message = str(caught.value)
    assert f"offset {left} of {file}" in message
    assert f"cannot read {min(SIZE - left, 8 * PAGE - left % (8 * PAGE))} bytes" in message
    assert "truncated" in message
    assert "download" in message
    assert "\n" not in message
    assert not caplog.records  # the filesystem refused nothing
    assert engine.files.get(str(file)).direct is was_direct
    engine.close()


def test_a_truncated_row(file: Path, arena: HostArena) -> None:
    engine = DiskEngine(threads=1)
    row = Bounce(path=str(file), file_offset=SIZE - 10, nbytes=10, offset=3, source_dtype="U8", target_dtype="U8")
    assert engine.read([], [row], arena.view(0, PAGE)).wait(WAIT_S)
    os.truncate(file, SIZE - 5)
    with pytest.raises(DiskError, match="truncated"):
        engine.read([], [row], arena.view(0, PAGE)).wait(WAIT_S)
    engine.close()


def test_reads_that_come_in_pieces_are_put_together(file: Path, arena: HostArena) -> None:
    """A signal or a network filesystem may cut a read anywhere; O_DIRECT then cannot go on, buffered reads can."""

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset) if len(buffers[0]) < 2 * PAGE else short(fd, buffers, offset)

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return min(os.preadv(fd, buffers, offset), 1000)

    engine = DiskEngine(threads=2, chunk_nbytes=16 * PAGE, pread=pread)
    image = whole(file)
    assert engine.read(image.windows, [], arena.view(0, 64 * PAGE)).wait(WAIT_S)
    assert bytes(arena.view(0, SIZE)) == file.read_bytes()
    engine.close()


def test_two_threads_may_find_at_once_that_direct_reads_are_refused(file: Path, arena: HostArena) -> None:
    engine = DiskEngine(threads=1)
    opened = engine.files.get(str(file))
    assert opened.direct
    seen: list[int] = []

    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not seen:
            seen.append(offset)
            opened.refuse_direct()  # as another thread does while this read is under way
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(fd, buffers, offset)

    engine.pread = pread
    assert engine.read(whole(file).windows, [], arena.view(0, 64 * PAGE)).wait(WAIT_S)
    assert bytes(arena.view(0, SIZE)) == file.read_bytes()
    engine.close()


def test_a_file_that_vanishes_when_it_must_be_opened_again(file: Path, arena: HostArena) -> None:
    def pread(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        file.unlink(missing_ok=True)
        raise OSError(errno.EINVAL, "Invalid argument")

    engine = DiskEngine(threads=1, pread=pread)
    if not engine.files.get(str(file)).direct:
        engine.close()
        pytest.skip("this filesystem refuses O_DIRECT")
    with pytest.raises(DiskError, match=r"cannot open.*weights\.bin.*No such file"):
        engine.read(whole(file).windows, [], arena.view(0, 64 * PAGE)).wait(WAIT_S)
    engine.close()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "dmesg"),
        (errno.EROFS, "another folder"),
        (errno.ESTALE, "check the drive"),
    ],
)
def test_failed_writes_name_file_offset_and_remedy(tmp_path: Path, arena: HostArena, code: int, remedy: str) -> None:
    path = tmp_path / "scratch.bin"
    engine = DiskEngine(threads=1, chunk_nbytes=2 * PAGE, pwrite=failing(code, after=2))
    transfer = engine.write(str(path), 3 * PAGE, arena.view(0, 10 * PAGE))
    with pytest.raises(DiskError) as caught:
        transfer.wait(WAIT_S)
    message = str(caught.value)
    assert f"cannot write {2 * PAGE} bytes at offset {7 * PAGE} of {path}" in message
    assert os.strerror(code) in message
    assert remedy in message
    assert engine.statistics().written_nbytes == 4 * PAGE
    engine.close()


def test_a_disk_that_is_full(arena: HostArena) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    engine = DiskEngine(threads=1, files=FileTable(open_file=buffered))
    with pytest.raises(DiskError, match=r"/dev/full: No space left on device; the disk is full"):
        engine.write(str(full), 0, arena.view(0, PAGE)).wait(WAIT_S)
    engine.close()


@pytest.mark.parametrize(("code", "remedy"), [(errno.EACCES, "owner and mode"), (errno.EMFILE, "ulimit")])
def test_files_that_cannot_be_opened(file: Path, arena: HostArena, code: int, remedy: str) -> None:
    def refuse(path: str, flags: int, mode: int) -> int:
        raise OSError(code, os.strerror(code))

    engine = DiskEngine(threads=1, files=FileTable(open_file=refuse))
    with pytest.raises(DiskError, match=remedy):
        engine.read(whole(file).windows, [], arena.view(0, 64 * PAGE))
    engine.close()
