"""Power loss: every disk that could be found afterwards must hold the last commit that was said to be done, or a later.

What a killed process leaves says nothing about fsync, since the page cache survives it. So the store runs over a
filesystem that logs each write, each change of a name and each sync; disks are rebuilt from the log for moments all
over it, in which whatever no sync covered is there, or not, or torn.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from store_files import HookedFiles, Log, LoggedFiles
from store_power import Crash, Disk, crash, disk_after, every_fate, random_fate, write_disk

from penstock.memory.arena import PAGE, HostArena, round_up
from penstock.memory.disk import DiskEngine
from penstock.memory.errors import StoreError
from penstock.memory.files import FileTable
from penstock.memory.store import BlockSpec, BlockStore, checksum
from penstock.memory.store.slots import Slots
from penstock.memory.transfer import Transfer

WAIT_S = 20.0
State = dict[int, bytes]


@dataclass
class Story:
    """What a process did before the power failed."""

    specs: list[BlockSpec]
    folders: list[Path]
    log: Log = field(default_factory=Log)
    states: dict[int, State] = field(default_factory=lambda: {0: {}})
    """What each commit holds."""

    def note_done(self, store: BlockStore, state: State) -> None:
        """Commit now; the log learns when the handle says done."""
        number = max(self.states) + 1
        self.states[number] = dict(state)  # before another thread changes it
        commit = store.commit(b"%d" % number)
        assert commit.number == number
        commit.add_done_callback(
            lambda over: None if over.error else self.log.done.append((self.log.tick(), over.number))
        )


def value(spec: BlockSpec, seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(spec.nbytes)


def small_story(root: Path, forget: frozenset[str] = frozenset()) -> Story:
    """Two blocks, four commits; a block is written in the middle of each sync of a commit."""
    story = Story([BlockSpec(name=name, kind="", nbytes=PAGE - 9) for name in "ab"], [root / "run"])
    files = LoggedFiles(story.log, forget)
    with BlockStore.create(story.folders, story.specs, identity="", metadata=b"0", files=files) as store:
        story.log.done.append((story.log.tick(), 0))
        state: State = {}

        def write(block: int, seed: object) -> None:
            data = value(story.specs[block], seed)
            if store.begin_write(block, timeout=0) is not None:
                store.written(block, 0)  # takes the place; the bytes follow
                store.write(block, data)
                state[block] = data

        write(0, "first")
        write(1, "first")
        for number in range(1, 5):
            seed = iter(range(100))
            files.during = lambda operation, number=number, seed=seed: write(number % 2, (number, next(seed)))
            story.note_done(store, state)
            assert store.drain(WAIT_S)
            files.during = None
            if number % 2:
                write(0, number)
    return story


def long_story(root: Path, seed: int) -> Story:
    """Blocks of several pages on one or two drives, written by an engine while commits are published."""
    draw = random.Random(seed)
    specs = [BlockSpec(name=str(i), kind="", nbytes=draw.choice([700, PAGE, 9000, 14000])) for i in range(4)]
    story = Story(specs, [root / f"run{drive}" for drive in range(draw.choice([1, 1, 2]))])
    files = LoggedFiles(story.log)
    arena = HostArena(sum(round_up(spec.nbytes) for spec in specs))
    slots = [arena.cut(spec.nbytes) for spec in specs]
    table = FileTable(open_file=files.open)
    engine = DiskEngine(threads=2, chunk_nbytes=PAGE, files=table, pwrite=files.pwritev)
    state: State = {}
    under_way: dict[int, tuple[Transfer, bytes]] = {}

    def land(store: BlockStore, block: int) -> None:
        transfer, data = under_way.pop(block)
        assert transfer.wait(WAIT_S)
        store.written(block, checksum(data))
        state[block] = data

    with BlockStore.create(story.folders, specs, identity="", metadata=b"0", files=files) as store:
        story.log.done.append((story.log.tick(), 0))
        for step in range(40):
            block = draw.randrange(len(specs))
            action = draw.random()
            if action < 0.5 and block not in under_way and (span := store.begin_write(block, timeout=0)) is not None:
                data = value(specs[block], (seed, step))
                view = arena.view(slots[block].offset, round_up(len(data)))
                view[: len(data)] = data
                under_way[block] = engine.write(span.path, span.offset, view), data
            elif action < 0.75 and block in under_way:
                land(store, block)
            elif action > 0.85:
                story.note_done(store, {**state, **{number: data for number, (_, data) in under_way.items()}})
                if draw.random() < 0.4:
                    for number in list(under_way):
                        land(store, number)
                    assert store.drain(WAIT_S)
        for number in list(under_way):
            land(store, number)
    engine.close()
    arena.close()
    return story


def quick() -> HookedFiles:
    """A filesystem without syncs, to look at what was found."""
    return HookedFiles(lambda operation, path, nbytes: None)


def examine(story: Story, moment: Crash, places: list[Path], *, go_on: bool = False) -> str:
    """What is wrong with the disk that was found; "" where nothing is."""
    try:
        with BlockStore.open(places, files=quick()) as store:
            number = int(store.metadata)
            if number < moment.done:
                return f"commit {moment.done} was said to be done, and commit {number} was found"
            found = {block: store.read(block) for block in range(len(story.specs)) if store.has_state(block)}
            if found != story.states[number]:
                return f"commit {number} is not what it was"
            if go_on:
                for block, spec in enumerate(story.specs):
                    store.write(block, value(spec, "after"))
                assert store.commit(b"after").wait(WAIT_S)
        if go_on:
            with BlockStore.open(places, files=quick()) as store:
                assert store.metadata == b"after"
                assert all(store.read(block) == value(spec, "after") for block, spec in enumerate(story.specs))
    except StoreError as error:
        if moment.done >= 0:
            return f"commit {moment.done} was said to be done, and then: {error}"
        # The power failed while the store was made: it can be made again in the same place.
        BlockStore.create(places, story.specs, identity="", files=quick()).close()
    return ""


def every_disk(story: Story) -> Iterator[tuple[Crash, Disk]]:
    """Every disk that could be found, each once for what had been promised by then."""
    known: set[tuple[int, int]] = set()
    for at in range(story.log.now + 1):
        moment = crash(story.log, at)
        for fates in every_fate(moment):
            disk = disk_after(moment, fates)
            key = hash(tuple((folder, tuple(sorted(names.items()))) for folder, names in disk.items())), moment.done
            if key not in known:
                known.add(key)
                yield moment, disk


@pytest.fixture
def found_place(tmp_path: Path) -> Iterator[Path]:
    """Where disks are rebuilt by the hundred: in memory, where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_every_disk_of_a_short_story(tmp_path: Path, found_place: Path) -> None:
    story = small_story(tmp_path / "story")
    log_folder, place = str(story.folders[0].resolve()), found_place / "found"
    cases = 0
    for cases, (moment, disk) in enumerate(every_disk(story), 1):  # noqa: B007
        write_disk(disk, {log_folder: place})
        problem = examine(story, moment, [place])
        assert not problem, f"at {moment.at}: {problem}"
    assert cases > 500
    assert len(story.states) == 5


def test_random_disks_of_long_stories(tmp_path: Path, found_place: Path) -> None:
    cases = 0
    found_later = 0
    for seed in range(16):
        story = long_story(tmp_path / f"story{seed}", seed)
        folders = {str(folder.resolve()): found_place / f"found{drive}" for drive, folder in enumerate(story.folders)}
        draw = random.Random(seed)
        for case in range(40):
            moment = crash(story.log, draw.randrange(story.log.done[0][0], story.log.now + 1))
            write_disk(disk_after(moment, random_fate(moment, draw)), folders)
            problem = examine(story, moment, list(folders.values()), go_on=case % 5 == 0)
            assert not problem, f"story {seed}, case {case}, at {moment.at}: {problem}"
            cases += 1
            found_later += bool(moment.open_events)
    assert cases >= 600
    assert found_later > cases / 2, "most moments must have something to lose"


@pytest.mark.parametrize("forgotten", ["fdatasync", "fsync", "fsync folder"])
def test_a_store_that_forgot_a_sync_would_be_caught(tmp_path: Path, forgotten: str) -> None:
    story = small_story(tmp_path / "story", frozenset({forgotten}))
    assert _first_problem(story, tmp_path / "found")


def test_a_store_that_wrote_to_a_slot_too_early_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(slots: Slots, block: int) -> int:
        """Forgets that the published manifest is what is found while the next one is on its way."""
        named = slots.cuts[-1].copies[block] if slots.cuts else slots.published[block]
        return 1 - named.slot if named is not None else 0

    monkeypatch.setattr(Slots, "target", careless)
    story = small_story(tmp_path / "story")
    assert _first_problem(story, tmp_path / "found")


def _first_problem(story: Story, place: Path) -> str:
    """By drawing: what is never synced stays open for good, so that there would be no end of disks."""
    log_folder = str(story.folders[0].resolve())
    draw = random.Random(0)
    for _ in range(600):
        moment = crash(story.log, draw.randrange(story.log.done[0][0], story.log.now + 1))
        write_disk(disk_after(moment, random_fate(moment, draw)), {log_folder: place})
        if problem := examine(story, moment, [place]):
            return problem
    return ""
