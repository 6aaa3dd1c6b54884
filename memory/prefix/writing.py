"""Writing a segment: to a new file, durably, then under the name by which readers find it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress

from ..errors import DiskError
from ..files import disk_error
from ..store.files import StoreFiles, write_all
from ..store.folder import NEW, remove
from .segment import SegmentRecord, pack_header

logger = logging.getLogger(__name__)


def write_segment(
    files: StoreFiles, folder: str, record: SegmentRecord, blocks: Sequence[memoryview], *, tick: int
) -> str:
    """Write a segment and publish it; its name is durable once the folder is synced. On failure, or when it is
    interrupted, nothing is left.

    A failed fsync is not tried again: the system may have dropped the bytes and forgotten.

    Args:
        files: The filesystem.
        folder: Where it goes.
        record: What the header says.
        blocks: Payloads, as many bytes each as the record says.
        tick: When it was used last, which is kept as the time of its last change.

    Returns:
        Its path.

    Raises:
        DiskError: it cannot be written.
    """
    path = os.path.join(folder, record.name)
    new = path + NEW
    try:
        fd = files.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError as error:
        raise disk_error("open", new, 0, record.nbytes, error) from error
    try:
        try:
            _fill(files, fd, new, record, blocks)
        except BaseException:
            with suppress(OSError):  # what failed before is told
                files.close(fd)
            raise
        try:
            files.close(fd)
        except OSError as error:  # a quota may be told as late as that
            raise disk_error("close", new, 0, record.nbytes, error) from error
        try:
            files.set_time(new, tick)
            files.rename(new, path)
        except OSError as error:
            raise disk_error("rename", new, 0, record.nbytes, error) from error
    except BaseException:
        try:
            remove(files, new)
        except DiskError as error:
            logger.debug("%s", error)  # the next who writes removes it
        raise
    return path


def _fill(files: StoreFiles, fd: int, path: str, record: SegmentRecord, blocks: Sequence[memoryview]) -> None:
    write_all(files, fd, path, memoryview(pack_header(record)), 0)
    for entry, block in zip(record.blocks, blocks, strict=True):
        write_all(files, fd, path, block, entry.offset)
    try:
        files.truncate(fd, record.nbytes)
        files.fsync(fd)
    except OSError as error:
        raise disk_error("fsync", path, 0, record.nbytes, error) from error
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it soon
