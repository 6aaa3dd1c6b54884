"""Random walks through the block store, against a dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.memory.layout import FileSpan
from penstock.memory.store import BlockSpec, BlockStore, Commit, SystemFiles, checksum, prune, stats, verify

WAIT_S = 20.0
SIZES = (1, 4096, 5000, 9000)
BLOCKS = st.integers(0, len(SIZES) - 1)
State = dict[int, bytes]


class Quick(SystemFiles):
    """Nobody pulls the plug here."""

    def fdatasync(self, fd: int) -> None:
        pass

    def fsync(self, fd: int) -> None:
        pass


class StoreMachine(RuleBasedStateMachine):
    """`running` is what was written, `committed` what a reopened store must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.running: State = {}
        self.committed: State = {}
        self.committed_metadata = b"first"
        self.open_writes: dict[int, tuple[FileSpan, bytes]] = {}
        self.pending: list[tuple[Commit, State, bytes]] = []
        self.values = 0

    @initialize(drives=st.integers(1, 3))
    def create(self, drives: int) -> None:
        self.folders = [self.root / str(drive) for drive in range(drives)]
        specs = [BlockSpec(name=str(size), kind="", nbytes=size) for size in SIZES]
        self.store = BlockStore.create(self.folders, specs, identity="x", metadata=b"first", files=Quick())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.root)

    def new_value(self, block: int) -> bytes:
        self.values += 1
        return (self.values.to_bytes(4, "little") * (SIZES[block] // 4 + 1))[: SIZES[block]]

    @rule(block=BLOCKS)
    def begin(self, block: int) -> None:
        if block in self.open_writes:
            return
        span = self.store.begin_write(block, timeout=0)
        if span is None:
            assert any(block in state for _, state, _ in self.pending), "nobody needs both slots"
            return
        value = self.new_value(block)
        self.open_writes[block] = span, value
        with open(span.path, "r+b") as file:  # half of it is there already
            file.seek(span.offset)
            file.write(value[: len(value) // 2])

    @precondition(lambda self: self.open_writes)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.open_writes)))
        span, value = self.open_writes.pop(block)
        with open(span.path, "r+b") as file:
            file.seek(span.offset)
            file.write(value)
        self.store.written(block, checksum(value))
        self.running[block] = value

    @precondition(lambda self: len(self.pending) < 3)
    @rule()
    def commit(self) -> None:
        self.values += 1
        metadata = str(self.values).encode()
        state = {**self.running, **{block: value for block, (_, value) in self.open_writes.items()}}
        self.pending.append((self.store.commit(metadata), state, metadata))

    @precondition(lambda self: self.pending and not self.open_writes)
    @rule()
    def drain(self) -> None:
        assert self.store.drain(WAIT_S)
        _, self.committed, self.committed_metadata = self.pending[-1]
        self.pending.clear()
        assert self.store.metadata == self.committed_metadata

    @precondition(lambda self: not self.pending)
    @rule(pruned=st.booleans(), home_only=st.booleans())
    def reopen(self, pruned: bool, home_only: bool) -> None:
        self.open_writes.clear()
        self.store.close()
        if pruned:
            prune(self.folders, files=Quick())
        self.store = BlockStore.open(self.folders[0] if home_only else self.folders, identity="x", files=Quick())
        assert self.store.metadata == self.committed_metadata
        assert self.store.committed == stats(self.folders[0]).commit
        self.running = dict(self.committed)

    @precondition(lambda self: not self.pending)
    @rule()
    def look_from_outside(self) -> None:
        report = verify(self.folders)
        assert report.good
        assert report.blocks == len(self.committed)
        with BlockStore.open(self.folders, readonly=True) as reader:
            assert {b: reader.read(b) for b in range(len(SIZES)) if reader.has_state(b)} == self.committed

    @invariant()
    def reads_what_was_written(self) -> None:
        if hasattr(self, "store"):
            for block in range(len(SIZES)):
                if block not in self.open_writes:
                    assert self.store.has_state(block) == (block in self.running)
                    if block in self.running:
                        assert self.store.read(block) == self.running[block]


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestStoreMachine = StoreMachine.TestCase
