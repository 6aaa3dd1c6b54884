"""The durable block store: blocks on disk that change all the time, and a last commit that is always whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..arena import round_up
from ..errors import CorruptBlockError, StoreError, UsageError
from ..layout import FileSpan
from .checksum import checksum
from .commit import Commit
from .creating import create_parts
from .files import StoreFiles, SystemFiles
from .holdings import Holdings
from .opening import Folder, Parts, open_parts
from .publisher import Publisher
from .slotmap import BlockSpec

STALL_S = 120.0
"""How long a wait may last before it is given up, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStoreStatistics:
    """A picture of an open store at one instant."""

    commit: int
    """Number of the newest published commit; 0 is the empty store."""
    pending_commits: int
    blocks_written: int
    """Blocks that have a state, committed or not."""
    blocks_being_written: int
    written_nbytes: int
    """Bytes written since the store was made, pages and manifests included. What a killed process wrote after its last
    commit is not known."""
    waits: int
    """How often a write had to wait for a publication."""


class BlockStore:
    """Blocks of fixed sizes in a folder, or in several on different drives. Thread-safe.

    The caller moves the bytes: it asks where a block lies (`location`), or where its next state is to go
    (`begin_write`), and says when the bytes are there (`written`). `commit` makes the state of that moment durable in
    the background. Whatever happens (a killed process, a lost power supply, a drive that fails), opening the store
    again gives the last commit that was published, as a whole.

    Made by `create` and `open`. Close it after the engine that writes its blocks: a write that lands later could meet
    the next owner's.
    """

    def __init__(self, parts: Parts, files: StoreFiles, *, readonly: bool, stall_s: float) -> None:
        self.readonly = readonly
        self._facts = parts.facts
        self._publisher = Publisher(files, parts.facts, parts.data, parts.found, stall_s)
        self._holdings = Holdings(self._publisher, parts.data, parts.locks)
        self._waits = 0
        self._finalizer = weakref.finalize(self, self._holdings.close)

    @classmethod
    def create(
        cls,
        folders: Folder | Sequence[Folder],
        blocks: Sequence[BlockSpec],
        *,
        identity: str,
        metadata: bytes = b"",
        files: StoreFiles | None = None,
        stall_s: float = STALL_S,
    ) -> BlockStore:
        """Make a store and open it, at commit 0, which holds no block.

        Folders are made if missing, and must be empty otherwise, or hold a store that never got beyond commit 0, which
        is replaced. The first is the home folder. Blocks are spread over the folders by size; all the room that they
        will ever take is taken from the drives now.

        Args:
            identity: Fingerprint of what the blocks belong to, to be compared when the store is opened.
            metadata: The caller's own document of commit 0.
            files: The filesystem; a seam for fault injection.
            stall_s: How long a wait may last before it is given up, in seconds.

        Raises:
            DoesNotFitError: a drive has not enough room.
            StoreError: a folder holds something that would be lost.
            StoreBusyError: another process uses a folder.
            UsageError: blocks or folders that have no meaning.
            DiskError: a file cannot be made. Nothing is left behind.
        """
        files = files or SystemFiles()
        parts = create_parts(files, folders, blocks, identity=identity, metadata=metadata)
        return cls(parts, files, readonly=False, stall_s=stall_s)

    @classmethod
    def open(
        cls,
        folders: Folder | Sequence[Folder],
        *,
        identity: str | None = None,
        readonly: bool = False,
        files: StoreFiles | None = None,
        stall_s: float = STALL_S,
    ) -> BlockStore:
        """Open a store at its last commit.

        The home folder is enough as long as the others are where they were; after a move, name them all. Opened
        `readonly`, nothing is locked and nothing can be written; another process may write meanwhile, and then a block
        read late can be one of a later commit, which `check` notices.

        Args:
            identity: What the store must belong to; None to take any.
            readonly: Look only.
            files: The filesystem; a seam for fault injection.
            stall_s: How long a wait may last before it is given up, in seconds.

        Raises:
            StoreError: there is no store, or its creation was cut off.
            StoreBusyError: somebody has it open for writing.
            StoreIdentityError: it belongs to something else.
            StoreVersionError: it is of another version of the format.
            StoreDamagedError: its files are damaged so that no commit is whole.
            DiskError: a file cannot be opened or read.
        """
        files = files or SystemFiles()
        parts = open_parts(files, folders, identity=identity, readonly=readonly)
        return cls(parts, files, readonly=readonly, stall_s=stall_s)

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The blocks, by id."""
        return self._facts.slotmap.blocks

    @property
    def identity(self) -> str:
        """What the store belongs to."""
        return self._facts.identity

    @property
    def folders(self) -> tuple[Path, ...]:
        """One per drive, the home folder first."""
        return tuple(Path(folder) for folder in self._facts.folders)

    @property
    def metadata(self) -> bytes:
        """The caller's document in the newest published commit."""
        return self._publisher.metadata

    @property
    def committed(self) -> int:
        """Number of the newest published commit; 0 is the empty store."""
        return self._publisher.published

    def find(self, name: str) -> int:
        """The id of a block.

        Raises:
            UsageError: there is none of this name.
        """
        for block, spec in enumerate(self.blocks):
            if spec.name == name:
                return block
        raise UsageError(
            f"the store in {self._facts.folders[0]} has no block named {name!r}; it has {len(self.blocks)}"
        )

    def has_state(self, block: int) -> bool:
        """Whether the block has a state, committed or not."""
        with self._in_use() as publisher:
            return publisher.slots.running[block] is not None

    def location(self, block: int) -> FileSpan:
        """Where the newest state of a block lies. It starts on a page, and the rest of its last page is unused.

        The place holds until the next `begin_write` of the block; what is being read must not be written.

        Raises:
            StoreError: the block was never written, or is being written.
        """
        with self._in_use():
            return self._facts.slotmap.span(block, self._state(block)[0])

    def checksum(self, block: int) -> int:
        """The checksum of the newest state of a block. Raises as `location` does."""
        with self._in_use():
            return self._state(block)[1]

    def check(self, block: int, data: bytes | bytearray | memoryview) -> None:
        """Compare what was read (the payload, or whole pages) with what was written.

        Raises:
            CorruptBlockError: it is something else.
            StoreError: the block was never written, or is being written.
        """
        view = memoryview(data)[: self.blocks[block].nbytes]
        assert len(view) == self.blocks[block].nbytes, (block, len(view))
        self.check_sum(block, checksum(view))

    def check_sum(self, block: int, found: int) -> None:
        """The same for a checksum that was taken while chunks came in (`RunningChecksum`)."""
        with self._in_use():
            slot, expected = self._state(block)
        if found == expected:
            return
        span = self._facts.slotmap.span(block, slot)
        raise CorruptBlockError(
            f"{self._facts.slotmap.label(block)} is corrupt: the {span.nbytes} bytes at offset {span.offset} of "
            f"{span.path} have checksum {found:016x} and were written with {expected:016x}. The drive or the memory "
            "changed them: look at `dmesg` and the drive's health, see with `penstock store verify` what else is bad, "
            "and go back to a copy of the run",
            block=block,
            path=span.path,
            offset=span.offset,
            expected_checksum=expected,
            found_checksum=found,
        )

    def begin_write(self, block: int, *, timeout: float | None = None) -> FileSpan | None:
        """Where the next state of a block is to be written, whole. Page-aligned, and so is the end of its last page.

        Waits while both places are needed by commits, until one of these is published; None after `timeout` seconds (0
        does not wait). A write that failed may be repeated to the same place before anything is said about it.

        Raises:
            StoreError: the block is being written already, the store is read-only, or it stopped after a failure.
            StallError: without a timeout: the publication does not end.
        """
        with self._in_use(to_write=True) as publisher:
            if block in publisher.slots.writing:
                raise StoreError(f"{self._facts.slotmap.label(block)} is being written already: one write at a time")
            if publisher.slots.target(block) is None:
                self._waits += 1
                what = (
                    f"commit {publisher.slots.cuts[0].number}, before {self._facts.slotmap.label(block)} can be written"
                )
                if not publisher.wait_until(lambda: publisher.slots.target(block) is not None, what, timeout):
                    return None
            return self._facts.slotmap.span(block, publisher.slots.begin(block).slot)

    def written(self, block: int, checksum: int) -> None:
        """The bytes are where `begin_write` said, all of them. `checksum` is that of the payload."""
        with self._in_use() as publisher:
            self._require_writing(block)
            publisher.landed(block, checksum, round_up(self.blocks[block].nbytes))

    def write_failed(self, block: int, error: Exception) -> None:
        """The bytes did not arrive. The store stops: its state is no longer one that the caller wanted.

        `close` it and `open` it again to go on from the last commit.
        """
        with self._in_use() as publisher:
            self._require_writing(block)
            del publisher.slots.writing[block]
            publisher.fail(error)

    def read(self, block: int) -> bytes:
        """The newest state of a block, checked; for small blocks and tools. Large ones go through the disk engine.

        Raises:
            CorruptBlockError: it is not what was written.
            DiskError: it cannot be read.
            StoreError: the block was never written, or is being written.
        """
        data = self._holdings.data.read(self.location(block))
        self.check(block, data)
        return data

    def write(self, block: int, data: bytes | bytearray | memoryview) -> None:
        """Write a new state of a block; for small blocks and tools.

        Raises:
            DiskError: it cannot be written. The store stops, see `write_failed`.
            StoreError, StallError: as `begin_write`.
        """
        view = memoryview(data).cast("B")
        if len(view) != self.blocks[block].nbytes:
            raise UsageError(
                f"{self._facts.slotmap.label(block)} has {self.blocks[block].nbytes} bytes, not {len(view)}"
            )
        span = self.begin_write(block)
        assert span is not None
        try:
            self._holdings.data.write(span, view)
        except Exception as error:
            self.write_failed(block, error)
            raise
        self.written(block, checksum(view))

    def reserve(self) -> Commit:
        """The handle of a commit that is to be made a little later, by `commit`: for who must not wait for the moment.

        Reserved ones are to be made in this order. Whoever finds that one cannot be made ends it (`Commit.finish`).

        Raises:
            StoreError: the store is read-only, or stopped after a failure.
        """
        with self._in_use(to_write=True) as publisher:
            return publisher.reserve()

    def commit(self, metadata: bytes, reserved: Commit | None = None) -> Commit:
        """Make the state of this moment durable, in the background. `reserved`: its handle, where there is one already.

        Writes that have begun belong to it, and it waits for them; those that begin later do not. Commits are published
        in order. One that fails leaves the last published commit as it is; after a full disk the next may succeed,
        after a failed fsync the store stops.

        Raises:
            StoreError: the store is read-only, or stopped after a failure. Later failures are in `Commit.error`.
        """
        with self._in_use(to_write=True) as publisher:
            return publisher.submit(bytes(metadata), reserved)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait for all writes to land and all commits to be published; False after `timeout` seconds for either.

        Raises:
            StoreError, DiskError, StallError: what went wrong with a write or a commit.
        """
        with self._in_use() as publisher:
            if publisher.failure is not None:
                raise publisher.failure
            if not publisher.wait_until(lambda: not publisher.slots.writing, "writes to land", timeout):
                return False
            commits = list(publisher.commits)
        return all(commit.wait(timeout) for commit in commits)

    def statistics(self) -> BlockStoreStatistics:
        """A frozen record of the store's state."""
        with self._in_use() as publisher:
            return BlockStoreStatistics(
                commit=publisher.published,
                pending_commits=len(publisher.slots.cuts),
                blocks_written=sum(copy is not None for copy in publisher.slots.running),
                blocks_being_written=len(publisher.slots.writing),
                written_nbytes=publisher.written_nbytes,
                waits=self._waits,
            )

    def close(self) -> None:
        """Publish what was committed, except commits that still wait for writes; let go of files and locks.

        What was written after the last commit is forgotten. More than once does no harm; a forked child does nothing.
        """
        self._finalizer()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _in_use(self, *, to_write: bool = False) -> Iterator[Publisher]:
        """The publisher, locked. In a forked child its lock may be held for ever, hence the look before."""
        self._holdings.require()
        with self._publisher.changed:
            self._holdings.require()
            if to_write and self.readonly:
                raise StoreError(f"the store in {self._facts.folders[0]} was opened read-only: open it for writing")
            if to_write and self._publisher.failure is not None:
                raise self._publisher.failure
            yield self._publisher

    def _state(self, block: int) -> tuple[int, int]:
        """Slot and checksum of the newest state of a block."""
        publisher, label = self._publisher, self._facts.slotmap.label
        if publisher.failure is not None:  # a write that failed may have gone over it
            raise publisher.failure
        if block in publisher.slots.writing:
            raise StoreError(f"{label(block)} is being written: it can be read when that is over")
        copy = publisher.slots.running[block]
        if copy is None:
            raise StoreError(f"{label(block)} was never written: there is nothing to read")
        assert copy.checksum is not None, block
        return copy.slot, copy.checksum

    def _require_writing(self, block: int) -> None:
        if block not in self._publisher.slots.writing:
            raise StoreError(f"{self._facts.slotmap.label(block)} is not being written: call begin_write first")
