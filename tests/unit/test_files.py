"""Open files: once per path, refused politely, closed."""

import errno
import logging
import os
from pathlib import Path

import pytest

from penstock.memory.errors import DiskError
from penstock.memory.files import FileTable, disk_error


def test_a_file_is_opened_once_and_once_more_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 4096)
    table = FileTable()
    one = table.get(str(path))
    assert table.get(str(path)) is one
    assert one.device == path.stat().st_dev
    other = table.get(str(path), writable=True)
    assert other is not one
    assert other.writable
    assert not os.get_inheritable(one.fd)
    table.close()
    table.close()
    for file in (one, other):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file.fd)


def test_refusal_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def opener(path: str, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.open(path, flags, mode)

    table = FileTable(open_file=opener)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            (tmp_path / name).touch()
            assert not table.get(str(tmp_path / name)).direct
    assert len(caplog.records) == 1
    table.close()


def test_falling_back_keeps_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"hello")
    table = FileTable()
    file = table.get(str(path))
    fd = file.fd
    file.refuse_direct()
    file.refuse_direct()
    assert (file.fd, file.direct) == (fd, False)
    assert os.pread(fd, 5, 0) == b"hello"  # no alignment asked for any more
    table.close()


def test_errors_name_file_offset_and_remedy(tmp_path: Path) -> None:
    error = disk_error("read", "/x/y", 7, 9, OSError(errno.EIO, "whatever"))
    assert str(error).startswith("cannot read 9 bytes at offset 7 of /x/y: Input/output error; the drive reported")
    assert "no number" in str(disk_error("read", "/x", 0, 0, OSError("no number")))
    with pytest.raises(DiskError, match="No such file"):
        FileTable().get(str(tmp_path / "gone"))
    with pytest.raises(DiskError, match="Is a directory"):
        FileTable().get(str(tmp_path), writable=True)
