"""Whatever happens to a prefix store, what it gives is right, or it gives nothing."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import prefix_child
import pytest
from prefix_blocks import (
    BLOCK_NBYTES,
    IDENTITY,
    NBYTES,
    TOKENS,
    capacity,
    get,
    payload,
    prompt,
    put,
    read,
    segments,
    used,
)
from store_files import FailingFiles, HookedFiles

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import PenstockError, StoreDamagedError
from penstock.memory.files import FileTable
from penstock.memory.prefix import KvIdentity, PrefixStore, chain, prune, stats, verify
from penstock.memory.prefix.folder import LABEL, read_label
from penstock.memory.prefix.segment import HEADER_NBYTES, unpack_header
from penstock.memory.store import SystemFiles, checksum

LARGE = 2**30


def test_killed_at_any_operation(tmp_path: Path) -> None:
    """kill -9 before, after, and in the middle of each operation on files, from opening to closing."""
    origin = tmp_path / "origin"
    with PrefixStore(origin, prefix_child.CAPACITY) as store:
        for tokens in prefix_child.STORED:
            put(store, tokens)
    nursery = subprocess.Popen(
        [sys.executable, prefix_child.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    last = status = 1
    left_over = 0
    while status != 0:
        folder = tmp_path / f"{last}"
        shutil.copytree(origin, folder)
        nursery.stdin.write(f"{folder} {last}\n")
        nursery.stdin.flush()
        said = []
        while not (line := nursery.stdout.readline().strip()).startswith("end"):
            said.append(line)
        status = int(line.split()[1])
        assert status in (0, -signal.SIGKILL), said
        assert used(folder) <= prefix_child.CAPACITY
        with PrefixStore(folder) as store:
            left_over += len(store.left_over)
            for tokens in prefix_child.STORED:
                get(store, tokens)
            for number in range(3):
                found = get(store, prefix_child.later(number))
                if f"stored {number}" in said and f"stored {number + 1}" not in said:
                    assert found == len(prefix_child.later(number)) // TOKENS
            assert store.statistics().bad_segments == 0
            for number in range(3):  # it can go on
                assert not put(store, prefix_child.later(number)).reason
            assert get(store, prefix_child.later(2)) == 3
            assert used(folder) <= prefix_child.CAPACITY
            assert verify(folder).good
        shutil.rmtree(folder)
        last += 1
    nursery.stdin.close()
    nursery.wait()
    nursery.stdout.close()
    assert last > 40
    assert left_over > 3


def test_every_bit_of_a_small_store(tmp_path: Path) -> None:
    """Each bit of a segment by what opening and reading it come to; then many through the whole path, in a store that
    is opened with the damage and in one that is open; and the label."""
    identity = dataclasses.replace(IDENTITY, block_tokens=1)
    tokens, nbytes = [7, 8, 9], 40
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, tokens, identity, nbytes=nbytes)
        (path,) = segments(folder)
        hit = store.lookup(identity, tokens)
    whole = path.read_bytes()
    record = unpack_header(whole, path.name, len(whole))
    right = [payload(identity, tokens, number, nbytes) for number in range(2)]
    noticed = 0
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        assert unpack_header(bytes(data[:HEADER_NBYTES]), path.name, len(data)) == record  # there are two copies
        for place, content in zip(hit.places, right, strict=True):
            found = data[place.span.offset : place.span.offset + nbytes]
            assert (checksum(found) == place.checksum) == (found == content)
            noticed += found != content
    assert noticed == 2 * nbytes * 8
    starts = [place.span.offset * 8 for place in hit.places]
    for bit in [*range(0, len(whole) * 8, 797), *(start + at for start in starts for at in range(0, nbytes * 8, 3))]:
        flip(path, bit)
        with PrefixStore(folder, readonly=True) as reader:
            damaged = [start <= bit < start + nbytes * 8 for start in starts]
            assert get(reader, tokens, identity, nbytes) == (damaged.index(True) if any(damaged) else 2)
        flip(path, bit)
    with PrefixStore(folder) as store:
        for bit in range(0, nbytes * 8, 7):
            (path,) = segments(folder)
            flip(path, starts[1] + bit)
            assert get(store, tokens, identity, nbytes) == 1
            assert segments(folder) == []
            assert put(store, tokens, identity, nbytes=nbytes).stored_blocks == 3
            assert get(store, tokens, identity, nbytes) == 2
    label = (folder / LABEL).read_bytes()
    for bit in [*range(80 * 8), *range(80 * 8, len(label) * 8, 61)]:  # all that is not zeros, and some of those
        data = bytearray(label)
        data[bit // 8] ^= 1 << bit % 8
        (folder / LABEL).write_bytes(data)
        found_label = read_label(SystemFiles(), folder)
        assert found_label is not None
        assert found_label.capacity_nbytes == LARGE


def test_damage_of_both_copies_of_a_header(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(2))
    (path,) = segments(folder)
    whole = path.read_bytes()
    draw = random.Random(5)
    for _ in range(100):
        data = bytearray(whole)
        for copy in range(2):
            data[copy * 4096 + draw.randrange(200)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with PrefixStore(folder, readonly=True) as reader:
            assert get(reader, prompt(2)) == 0
    with PrefixStore(folder) as store:
        assert (segments(folder), store.statistics().bad_segments) == ([], 1)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (value,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def test_every_length_that_a_file_may_be_cut_to(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(2))
        (path,) = segments(folder)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 1021), len(whole) - 1, len(whole) + 1]:
        path.write_bytes(whole[:length] if length <= len(whole) else whole + b"x")
        with PrefixStore(folder, readonly=True) as reader:
            assert get(reader, prompt(2)) == 0
        assert not verify(folder).good
        assert stats(folder).bad_segments == 1
    for length in (0, 1, HEADER_NBYTES, HEADER_NBYTES + BLOCK_NBYTES):  # while it is open
        path.write_bytes(whole)
        with PrefixStore(folder, readonly=True) as reader:
            hit = reader.lookup(IDENTITY, prompt(2))
            path.write_bytes(whole[:length])
            assert len(read(reader, hit)) == max(0, length - HEADER_NBYTES) // BLOCK_NBYTES
            assert get(reader, prompt(2)) == 0  # it is not tried again
    with PrefixStore(folder) as store:  # the one who writes removes it, and stores anew
        assert segments(folder) == []
        put(store, prompt(2))
        assert get(store, prompt(2)) == 2


def test_a_segment_under_another_name_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(1))
    (path,) = segments(folder)
    shutil.copy(path, folder / ("ab" * 16 + ".kv"))
    (folder / ("cd" * 16 + ".kv")).symlink_to(path)
    (folder / ("ef" * 16 + ".kv")).mkdir()
    (folder / "notes.kv").write_text("not ours")
    with PrefixStore(folder) as store:
        assert store.statistics().segments == 1
        assert store.statistics().used_nbytes == used_of(folder)
        assert get(store, prompt(1)) == 1
    assert not (folder / ("ab" * 16 + ".kv")).exists()
    assert (folder / "notes.kv").exists()
    assert path.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_at_any_step_is_told_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    """A full disk, and a drive that fails: the store goes on, and stores when there is room again."""
    steps: list[str] = []
    failing = -1

    def hook(operation: str, path: str, nbytes: int) -> None:
        if operation in ("create", "pwrite", "truncate", "fsync", "rename") and armed:
            steps.append(operation)
            if len(steps) - 1 == failing:
                raise OSError(code, "injected")

    folder = tmp_path / "store"
    armed = False
    with PrefixStore(folder, LARGE, files=HookedFiles(hook)) as store:
        put(store, prompt(1, 1))
        armed = True
        put(store, prompt(1, 2))
        count = len(steps)
        assert steps == ["create", "pwrite", "pwrite", "truncate", "fsync", "rename", "fsync"]
        for failing in range(count):
            steps.clear()
            before = used(folder)
            report = put(store, prompt(1, 3 + failing))
            if failing == count - 1:  # the folder's fsync: the segment is there, if power holds
                assert report.stored_blocks == 1
            else:
                assert report.stored_blocks == 0
                assert "injected" in report.reason or "disk" in report.reason or "drive" in report.reason
                assert used(folder) == before
                assert get(store, prompt(1, 3 + failing)) == 0
            failing = -1
            assert get(store, prompt(1, 1)) == 1
            assert not put(store, prompt(1, 3 + failing + 100)).reason
    assert verify(folder).good


class FailingClose(SystemFiles):
    """Closes, and then fails, as a filesystem with quotas may. Some operations are interrupted."""

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}
        self.close_fails = False
        self.interrupted = ""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self.paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        if self.close_fails and self.paths[fd].endswith(".kv.new"):
            raise OSError(errno.EDQUOT, "injected")

    def fsync(self, fd: int) -> None:
        if self.interrupted == "fsync":
            raise KeyboardInterrupt

    def rename(self, source: str, target: str) -> None:
        if self.interrupted == "rename":
            raise KeyboardInterrupt
        super().rename(source, target)


def test_a_close_that_fails_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    files = FailingClose()
    with PrefixStore(folder, LARGE, files=files) as store:
        before = sorted(folder.iterdir())
        files.close_fails = True
        report = put(store, prompt(1))
        assert report.stored_blocks == 0
        assert "cannot close" in report.reason
        assert "quota" in report.reason
        assert sorted(folder.iterdir()) == before
        files.close_fails = False
        assert put(store, prompt(1)).stored_blocks == 1


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path, operation: str) -> None:
    folder = tmp_path / "store"
    files = FailingClose()
    with PrefixStore(folder, LARGE, files=files) as store:
        before = sorted(folder.iterdir())
        files.interrupted = operation
        with pytest.raises(KeyboardInterrupt):
            put(store, prompt(1))
        assert sorted(folder.iterdir()) == before
        files.interrupted = ""
        assert put(store, prompt(1)).stored_blocks == 1
        assert get(store, prompt(1)) == 1


def test_a_full_disk_at_the_beginning_is_an_error_of_opening(tmp_path: Path) -> None:
    files = FailingFiles()
    files.fail["pwrite penstock-prefixes.new"] = errno.ENOSPC
    with pytest.raises(PenstockError, match="disk is full"):
        PrefixStore(tmp_path / "store", LARGE, files=files)
    files.fail.clear()
    with PrefixStore(tmp_path / "store", LARGE, files=files) as store:
        assert put(store, prompt(1)).stored_blocks == 1


def test_a_drive_that_fails_to_read_is_a_miss_and_removes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def fail(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, "injected")

    with PrefixStore(folder, LARGE, make_engine=lambda: DiskEngine(pread=fail)) as store:
        put(store, prompt(2))
        assert get(store, prompt(2)) == 0
        assert store.lookup(IDENTITY, prompt(2)).tokens == 0
        assert store.statistics().used_nbytes == used_of(folder)
        put(store, prompt(2))  # beside what cannot be read
    assert len(segments(folder)) == 2
    with PrefixStore(folder) as store:  # it can be read again
        assert get(store, prompt(2)) == 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_takes_room_and_goes_first(tmp_path: Path, code: int) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(4, 4)) as store:
        for seed in range(4):
            put(store, prompt(1, seed))
        lost = [store.lookup(IDENTITY, prompt(1, seed)).places[0].segment for seed in (2, 3)]
    files = FailingFiles()
    files.fail = {f"{'pread' if code == errno.EIO else 'open'} {name}": code for name in lost}
    with PrefixStore(folder, files=files) as store:
        assert store.statistics().used_nbytes == used_of(folder) == capacity(4, 4)
        put(store, prompt(1, 4))
        assert used(folder) <= store.capacity_nbytes
        assert sum((folder / name).exists() for name in lost) == 1
        assert [get(store, prompt(1, seed)) for seed in (0, 1, 4)] == [1, 1, 1]
        files.fail.update({f"unlink {name}": errno.EIO for name in lost})  # then another one goes
        put(store, prompt(1, 5))
        assert used(folder) <= store.capacity_nbytes
        assert [get(store, prompt(1, seed)) for seed in (0, 1, 4, 5)] == [0, 1, 1, 1]
        assert store.statistics().used_nbytes == used_of(folder)


def test_what_cannot_be_read_and_is_gone_takes_no_room(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(1))
    (path,) = segments(folder)
    files = FailingFiles()
    files.fail[f"pread {path.name}"] = errno.EIO
    with PrefixStore(folder, readonly=True, files=files) as reader:
        assert reader.statistics().used_nbytes == capacity(1, 1)
        path.unlink()
        assert get(reader, prompt(1)) == 0
        assert reader.statistics().used_nbytes == capacity(0, 0)


def test_a_reader_short_of_descriptors_looks_again(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(1))
    files = FailingFiles()
    files.fail[f"open {segments(folder)[0].name}"] = errno.EMFILE
    with PrefixStore(folder, readonly=True, files=files) as reader:
        assert get(reader, prompt(1)) == 0
        files.fail.clear()
        assert get(reader, prompt(1)) == 1


def test_pruning_counts_what_stays(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(1))
    files = FailingFiles()
    files.fail[f"pread {segments(folder)[0].name}"] = errno.EIO
    pruned = prune(folder, files=files)
    assert (pruned.removed_segments, pruned.freed_nbytes, pruned.used_nbytes) == (0, 0, capacity(1, 1))


def many_segments(store: PrefixStore, blocks: int) -> list[int]:
    tokens = prompt(blocks)
    for number in range(blocks):
        put(store, tokens[: (number + 1) * TOKENS], first=number)
    return tokens


def test_a_long_hit_has_few_files_open_at_a_time(tmp_path: Path) -> None:
    most = 0

    def count(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal most
        names = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                names.append(os.readlink(f"/proc/self/fd/{number}"))
        most = max(most, sum(name.endswith(".kv") for name in names))
        return os.preadv(fd, buffers, offset)

    with PrefixStore(tmp_path / "store", LARGE, make_engine=lambda: DiskEngine(pread=count)) as store:
        tokens = many_segments(store, 50)
        assert get(store, tokens) == 50
    assert 0 < most <= 16


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("good", [0, 5, 30])
def test_a_shortage_of_this_process_is_a_short_read_and_hides_nothing(tmp_path: Path, code: int, good: int) -> None:
    short = True
    opened: list[str] = []

    def open_file(path: str, flags: int, mode: int) -> int:
        opened.append(path)
        if short and len(opened) > good:
            raise OSError(code, "injected")
        return os.open(path, flags, mode)

    with PrefixStore(
        tmp_path / "store", LARGE, make_engine=lambda: DiskEngine(files=FileTable(open_file=open_file))
    ) as store:
        tokens = many_segments(store, 40)
        assert get(store, tokens) == good
        short = False
        assert get(store, tokens) == 40
        assert store.statistics().bad_segments == 0


@pytest.mark.parametrize("bad", [0, 7, 8, 23, 39])
def test_damage_anywhere_in_a_long_hit_ends_it_there(tmp_path: Path, bad: int) -> None:
    with PrefixStore(tmp_path / "store", LARGE) as store:
        tokens = many_segments(store, 40)
        place = store.lookup(IDENTITY, tokens).places[bad]
        flip(Path(place.span.path), place.span.offset * 8)
        assert get(store, tokens) == bad
        assert not Path(place.span.path).exists()
        assert store.lookup(IDENTITY, tokens).tokens == bad * TOKENS


def used_of(folder: Path) -> int:
    return stats(folder).used_nbytes


def test_folders_that_cannot_be_written_to_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(1))

    class NoTimes(HookedFiles):
        def set_time(self, path: str, seconds: int) -> None:
            raise OSError(errno.EROFS, "injected")

    with PrefixStore(folder, readonly=True, files=NoTimes(lambda *_: None)) as reader:
        assert get(reader, prompt(1)) == 1


def test_a_label_without_a_good_copy_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    PrefixStore(folder, LARGE).close()
    (folder / LABEL).write_bytes(b"nonsense")
    for readonly in (False, True):
        with pytest.raises(StoreDamagedError, match=f"remove {folder}"):
            PrefixStore(folder, readonly=readonly)
    shutil.rmtree(folder)
    PrefixStore(folder, LARGE).close()


def test_clocks_may_go_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is asked: the order of use is a count."""
    now = [2e9]

    def backwards() -> float:
        now[0] -= 1000.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "monotonic", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    folder = tmp_path / "store"
    for seed in range(4):
        with PrefixStore(folder, capacity(3, 3)) as store:
            put(store, prompt(1, seed))
            get(store, prompt(1, 0))
    with PrefixStore(folder) as store:
        assert [get(store, prompt(1, seed)) for seed in range(4)] == [1, 0, 1, 1]


def test_new_weights_find_nothing_and_push_the_old_ones_out(tmp_path: Path) -> None:
    new = dataclasses.replace(IDENTITY, weights="w2")
    with PrefixStore(tmp_path / "store", capacity(4, 2)) as store:
        put(store, prompt(2))
        assert get(store, prompt(2), new) == 0
        put(store, prompt(2), new)
        assert (get(store, prompt(2)), get(store, prompt(2), new)) == (2, 2)
        put(store, prompt(2, 5), new)
        assert [get(store, prompt(2)), get(store, prompt(2), new), get(store, prompt(2, 5), new)] == [0, 2, 2]


def test_no_wrong_hit_in_a_hundred_thousand_lookups(tmp_path: Path) -> None:
    """Prompts of a tiny alphabet, so that almost all beginnings are near another, under mutations of tokens and of the
    identity; the reference is a set of beginnings. Blocks are read and compared in every 200th."""
    draw = random.Random(11)
    identities = [
        dataclasses.replace(IDENTITY, weights=str(w), salt=str(s), block_tokens=2) for w in "ab" for s in "xy"
    ]
    stored: set[tuple[KvIdentity, tuple[int, ...]]] = set()
    prompts: list[tuple[KvIdentity, list[int]]] = []
    hits = reads = 0
    with PrefixStore(tmp_path / "store", LARGE) as store:
        for _ in range(150):
            identity = draw.choice(identities)
            tokens = [draw.randrange(3) for _ in range(draw.randrange(2, 24))]
            put(store, tokens, identity, nbytes=64)
            prompts.append((identity, tokens))
            stored.update((identity, tuple(tokens[: 2 * (at + 1)])) for at in range(len(tokens) // 2))
        for number in range(100_000):
            identity, original = draw.choice(prompts)
            tokens = list(original)
            for _ in range(draw.randrange(3)):
                mutate(draw, tokens)
            if draw.random() < 0.2:
                identity = draw.choice(identities)
            hit = store.lookup(identity, tokens)
            expected = 0
            while expected + 2 < len(tokens) and (identity, tuple(tokens[: expected + 2])) in stored:
                expected += 2
            assert hit.tokens == expected, (identity, tokens)
            hits += hit.tokens > 0
            if number % 200 == 0 and hit.places:
                reads += 1
                assert read(store, hit, 64) == [payload(identity, tokens, at, 64) for at in range(len(hit.places))]
        assert store.statistics().lookups == 100_000
    assert hits > 50_000
    assert reads > 250


def mutate(draw: random.Random, tokens: list[int]) -> None:
    if not tokens or draw.random() < 0.3:
        tokens.insert(draw.randrange(len(tokens) + 1), draw.randrange(3))
    elif draw.random() < 0.5:
        tokens[draw.randrange(len(tokens))] = draw.randrange(3)
    else:
        del tokens[draw.randrange(len(tokens))]


def test_keys_hang_on_every_token_before() -> None:
    tokens = prompt(6)
    keys = list(chain(IDENTITY, tokens))
    for at in range(6 * TOKENS):
        other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
        same = [mine == theirs for mine, theirs in zip(keys, chain(IDENTITY, other), strict=True)]
        assert same == [number < at // TOKENS for number in range(6)]
    assert NBYTES
