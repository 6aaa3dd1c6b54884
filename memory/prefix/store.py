"""The prefix store: `lookup`, `read`, `put`."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..arena import PAGE
from ..disk import DiskEngine
from ..errors import ClosedError, DiskError, ForkError, StoreError, UsageError
from ..filelock import FileLock
from ..store.checksum import checksum
from ..store.files import StoreFiles, SystemFiles
from .folder import (
    is_prefix_store,
    lock_folder,
    make_folder,
    new_name,
    read_label,
    remove_left_over,
    require_empty,
    require_private,
    write_label,
)
from .identity import KvIdentity, chain
from .index import Place
from .library import Library
from .reading import read_blocks
from .segment import MOST_BLOCKS, MOST_NBYTES, SegmentRecord, place_blocks
from .writing import write_segment

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixHit:
    """The longest beginning of a prompt that is stored."""

    tokens: int
    """How many of its tokens; 0 where nothing is. Always a multiple of the block, and less than the prompt's."""
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        """Payload of all its blocks."""
        return sum(place.span.nbytes for place in self.places)


@dataclass(frozen=True, kw_only=True, slots=True)
class PutReport:
    """What came of storing blocks."""

    stored_blocks: int
    known_blocks: int
    """That were there already."""
    written_nbytes: int
    """Files, headers included."""
    reason: str
    """Why the rest was not stored; "" where all is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStatistics:
    """A store as this process knows it, and what it did since it was opened."""

    segments: int
    blocks: int
    used_nbytes: int
    capacity_nbytes: int
    lookups: int
    hits: int
    """Lookups that found at least a block."""
    read_nbytes: int
    read_s: float
    """In which reads were under way, several at once counted once."""
    written_nbytes: int
    evicted_segments: int
    bad_segments: int


class PrefixStore:
    """Keys and values of prompts, kept in a folder. One may write, any number may read at the same time.

    What is bad is not there: damage costs computing again, and is never an error of `lookup` or `read`. Several threads
    may use it.

    Args:
        folder: Made if it is not there, with mode 0700.
        capacity_nbytes: Of all its files, never exceeded. Kept in the folder: None leaves it as it is.
        readonly: Only look and read.
        files: The filesystem; a seam for fault injection.
        make_engine: What blocks are read by; likewise.
        clock: Seconds.

    Raises:
        UsageError: a new store without a capacity, a capacity that holds nothing, or one for reading only.
        StoreBusyError: somebody else writes.
        StoreError: the folder is something else, or others may enter it.
        StoreDamagedError, StoreVersionError: its label cannot be read.
        DiskError: the folder cannot be read, or made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity_nbytes: int | None = None,
        *,
        readonly: bool = False,
        files: StoreFiles | None = None,
        make_engine: Callable[[], DiskEngine] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if readonly and capacity_nbytes is not None:
            raise UsageError("a store that is opened for reading keeps its capacity: leave capacity out")
        self.folder = Path(folder).absolute()
        self.readonly = readonly
        self._files = files or SystemFiles()
        self._make_engine = make_engine or (lambda: DiskEngine(staging_nbytes=PAGE))
        self._lock = threading.RLock()
        self._writing = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._clock = clock
        self._reads = 0
        """Under way."""
        self._reads_began_s = self._read_s = 0.0
        self._lookups = self._hits = self._read_nbytes = self._written_nbytes = 0
        self.left_over: tuple[str, ...] = ()
        """Files that a killed process had left, and that were removed."""
        if not is_prefix_store(self.folder):
            if readonly:
                raise StoreError(f"there is no prefix store in {self.folder}: name the folder that one was made in")
            if capacity_nbytes is None:
                raise UsageError(f"a new prefix store needs a capacity: say how large {self.folder} may become")
            make_folder(self.folder)
        require_private(self.folder)
        self._finalizer = weakref.finalize(self, _let_go, None if readonly else lock_folder(self.folder), self._pid)
        try:
            self._open(capacity_nbytes)
        except BaseException:
            self._finalizer()
            raise

    def lookup(self, identity: KvIdentity, tokens: Sequence[int]) -> PrefixHit:
        """The longest beginning of a prompt that is stored. It counts as used.

        At least the last token is left out: a model has to be called with something, and transformers computes the
        whole prompt again where a cache holds all of it.

        Raises:
            UsageError: the tokens are no whole numbers, or a block of this identity has none.
        """
        self._require()
        with self._lock:
            if self.readonly:
                with suppress(DiskError):  # what is gone with its folder is found out when it is read
                    self._library.refresh()
            places = self._library.index.find(chain(identity, tokens[:-1]))
            self._lookups += 1
            self._hits += bool(places)
            if places:
                self._library.use(places)
        return PrefixHit(tokens=len(places) * identity.block_tokens, places=places)

    def read(self, hit: PrefixHit, into: Sequence[memoryview], *, wanted: Callable[[], bool] = lambda: True) -> int:
        """Read what was found, and check it.

        Args:
            hit: What `lookup` returned, or some of its places from the first one on.
            into: For each block a writable view, whole pages long; of memory on a page boundary, so that the drive
                writes there itself. After the last good block their contents mean nothing.
            wanted: Asked before each block is waited for; reading ends where it is not.

        Returns:
            How many blocks are there, from the first one on: what was removed or damaged since then is not.

        Raises:
            UsageError: a view is too short, or there is not one for each block.
        """
        self._require()
        if not hit.places:
            return 0
        with self._timed():
            engine = self._make_engine()
            try:
                outcome = read_blocks(hit.places, into, engine, wanted=wanted)
            finally:
                engine.close()
        with self._lock:
            self._read_nbytes += sum(place.span.nbytes for place in hit.places[: outcome.blocks])
            if outcome.failure is not None:
                self._library.spoil(hit.places[outcome.blocks], outcome.failure)
        return outcome.blocks

    def put(self, identity: KvIdentity, tokens: Sequence[int], blocks: Sequence[Bytes], *, first: int = 0) -> PutReport:
        """Store blocks of a prompt, durably. What is there already is not written again.

        A full disk, a drive that fails, or a capacity that is too small is told in the report: the answer does not need
        the store.

        Args:
            identity: What they depend on, beside tokens.
            tokens: Of the prompt, from its first one on, as far as the last of these blocks.
            blocks: Payload of each.
            first: How many blocks are before them.

        Raises:
            UsageError: there are fewer tokens than the blocks hold, or a block is empty.
            StoreError: the store was opened for reading.
        """
        self._require(to_write=True)
        keys = tuple(chain(identity, tokens, blocks=first + len(blocks)))
        views = [memoryview(block).cast("B") for block in blocks]
        if len(keys) < first + len(blocks) or not all(view.nbytes for view in views):
            raise UsageError(
                f"{len(blocks)} blocks after {first} of {identity.block_tokens} tokens each were given, none of which "
                f"may be empty, with {len(tokens)} tokens: give the tokens of all blocks"
            )
        stored = known = written = 0
        reason = ""
        with self._writing:
            at = first
            while at < len(keys) and not reason:
                with self._lock:
                    there = len(self._library.index.find(keys[: at + 1])) > at
                if there:
                    known, at = known + 1, at + 1
                    continue
                count = self._run(keys[at:], views[at - first :])
                nbytes, reason = self._store(identity, keys, at, views[at - first : at - first + count])
                written += nbytes
                stored += count if not reason else 0
                at += count
        return PutReport(stored_blocks=stored, known_blocks=known, written_nbytes=written, reason=reason)

    def remove_unreachable(self) -> int:
        """Remove segments that follow a block that is gone. Returns how many.

        Raises:
            DiskError: one cannot be removed.
        """
        self._require(to_write=True)
        with self._writing, self._lock:
            names = self._library.index.orphans()
            for name in names:
                self._library.give_up(name)
            return len(names)

    def statistics(self) -> PrefixStatistics:
        """A frozen record of the store."""
        self._require()
        with self._lock:
            return PrefixStatistics(
                segments=len(self._library.index.segments),
                blocks=len(self._library.index.places),
                used_nbytes=self._library.used_nbytes,
                capacity_nbytes=self.capacity_nbytes,
                lookups=self._lookups,
                hits=self._hits,
                read_nbytes=self._read_nbytes,
                read_s=self._read_s,
                written_nbytes=self._written_nbytes,
                evicted_segments=self._library.evicted,
                bad_segments=self._library.spoiled,
            )

    def close(self) -> None:
        """Let another one write. More than once does no harm; a forked child does nothing."""
        if os.getpid() == self._pid:
            with self._writing, self._lock:
                self._closed = True
                self._finalizer()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time in which anything is read."""
        with self._lock:
            self._reads += 1
            if self._reads == 1:
                self._reads_began_s = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1
                if not self._reads:
                    self._read_s += self._clock() - self._reads_began_s

    def _open(self, capacity_nbytes: int | None) -> None:
        label = read_label(self._files, self.folder)
        if label is None:
            require_empty(self._files, self.folder)
        before = label.capacity_nbytes if label is not None else 0
        self.capacity_nbytes = before if capacity_nbytes is None else capacity_nbytes
        """Of all files."""
        if self.capacity_nbytes != before or label is None:
            write_label(self._files, self.folder, self.capacity_nbytes)
        if not self.readonly:
            self.left_over = remove_left_over(self._files, self.folder)
        self._library = Library(self._files, self.folder, readonly=self.readonly)
        if not self.readonly:
            self._library.make_room(0, self.capacity_nbytes, ())

    def _run(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        """How many blocks go into the next segment."""
        count = nbytes = 0
        with self._lock:
            for key, view in zip(keys, views, strict=True):
                nbytes += view.nbytes
                full = count == MOST_BLOCKS or (count and nbytes > MOST_NBYTES)
                if full or key in self._library.index.places:
                    break
                count += 1
        return count

    def _store(
        self, identity: KvIdentity, keys: Sequence[bytes], at: int, views: Sequence[memoryview]
    ) -> tuple[int, str]:
        """Write one segment. Returns its length, or 0 and why not."""
        record = SegmentRecord(
            name=new_name(),
            root=identity.root(),
            parent=keys[at - 1] if at else identity.root(),
            first=at,
            block_tokens=identity.block_tokens,
            blocks=place_blocks(keys[at : at + len(views)], [v.nbytes for v in views], [checksum(v) for v in views]),
        )
        try:
            with self._lock:
                before = self._library.index.find(keys[:at])
                if len(before) < at:
                    return 0, f"block {len(before)}, before those, is not stored: nobody would find them"
                keep = {place.segment for place in before}
                if not self._library.make_room(record.nbytes, self.capacity_nbytes, keep):
                    return 0, (
                        f"{record.nbytes} bytes more do not fit {self.capacity_nbytes}, beside the blocks before them: "
                        "give the store more capacity"
                    )
                tick = self._library.index.tick + 1
            path = write_segment(self._files, str(self.folder), record, views, tick=tick)
        except DiskError as error:
            return 0, str(error)
        with self._lock:
            self._library.index.add(record, path, tick)
            self._library.sync()
            self._library.use(self._library.index.find(keys[: at + len(views)]))
            self._written_nbytes += record.nbytes
        return record.nbytes, ""

    def _require(self, *, to_write: bool = False) -> None:
        if os.getpid() != self._pid:
            raise ForkError("a prefix store does not exist in a forked child: open another there, for reading")
        if self._closed:
            raise ClosedError("the prefix store was closed; open it again")
        if to_write and self.readonly:
            raise StoreError(f"the prefix store in {self.folder} was opened for reading: open it for writing")


def _let_go(lock: FileLock | None, pid: int) -> None:
    if lock is not None and os.getpid() == pid:
        with suppress(OSError):
            lock.release()
