"""The prefix store: what it finds, what it keeps, and who may have it."""

from __future__ import annotations

import dataclasses
import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prefix_blocks import (
    BLOCK_NBYTES,
    IDENTITY,
    NBYTES,
    SEGMENT_NBYTES,
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

import penstock
from penstock.memory.errors import ClosedError, ForkError, StoreBusyError, StoreError, UsageError
from penstock.memory.prefix import KvIdentity, PrefixStore, chain, prune, stats, verify
from penstock.memory.prefix.index import Index
from penstock.memory.prefix.segment import MOST_BLOCKS, SegmentRecord, place_blocks

LARGE = 2**30


def test_a_prompt_that_begins_alike_is_found_and_one_token_is_left(tmp_path: Path) -> None:
    tokens = prompt(5)
    with PrefixStore(tmp_path / "store", LARGE) as store:
        report = put(store, tokens)
        assert (report.stored_blocks, report.known_blocks, report.reason) == (5, 0, "")
        assert get(store, tokens) == 5
        assert get(store, tokens[: 5 * TOKENS]) == 4  # the last token has to be computed
        assert get(store, tokens[: 3 * TOKENS] + prompt(3, seed=1)) == 3
        assert get(store, [tokens[0] + 1, *tokens[1:]]) == 0
        assert get(store, []) == 0
        again = put(store, tokens)
        assert (again.stored_blocks, again.known_blocks, again.written_nbytes) == (0, 5, 0)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()} == {0o600}


def test_everything_that_keys_and_values_depend_on_parts_them(tmp_path: Path) -> None:
    tokens = prompt(3)
    with PrefixStore(tmp_path / "store", LARGE) as store:
        put(store, tokens)
        for field in ("weights", "dtype", "rope", "layout", "adapter", "salt"):
            other = dataclasses.replace(IDENTITY, **{field: "other"})
            assert get(store, tokens, other) == 0, field
        assert get(store, tokens, dataclasses.replace(IDENTITY, block_tokens=2)) == 0
        # Texts that run into each other differ still.
        shifted = [
            KvIdentity(weights="a", dtype="bc", rope="", layout="", block_tokens=1),
            KvIdentity(weights="ab", dtype="c", rope="", layout="", block_tokens=1),
        ]
        assert len({identity.root() for identity in shifted}) == 2
    with pytest.raises(UsageError, match="64 bits"):
        list(chain(IDENTITY, [2**63] * TOKENS))


def test_keys_are_the_same_in_every_process() -> None:
    """Fixed numbers: a store outlives versions of Python, and seeds of its hash."""
    assert [key.hex()[:16] for key in chain(IDENTITY, list(range(9)))] == ["f45f53808e121666", "e96a1d13fbde2748"]


def test_it_is_there_after_a_restart_with_capacity_and_order_of_use(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    prompts = [prompt(1, seed) for seed in range(4)]
    with PrefixStore(folder, capacity(3, 3)) as store:
        for tokens in prompts[:3]:
            put(store, tokens)
        assert get(store, prompts[0]) == 1  # now 1 is the one that was used longest ago
    with PrefixStore(folder) as store:
        assert store.capacity_nbytes == capacity(3, 3)
        put(store, prompts[3])
        assert [get(store, tokens) for tokens in prompts] == [1, 0, 1, 1]
        assert store.statistics().evicted_segments == 1
        assert used(folder) <= capacity(3, 3)
    with PrefixStore(folder, capacity(1, 1)) as store:  # lowered: the one used last stays
        assert [get(store, tokens) for tokens in prompts] == [0, 0, 0, 1]


def test_the_beginning_of_a_sequence_outlives_its_end(tmp_path: Path) -> None:
    system, chats = prompt(2, more=0), [prompt(2, seed) for seed in range(5)]
    with PrefixStore(tmp_path / "store", capacity(6, 3)) as store:
        for chat in chats:
            assert not put(store, system + chat).reason
            assert get(store, system + chat) == 4
        # The system prompt was written with the first chat, in one segment.
        assert [get(store, system + chat) for chat in chats] == [4, 2, 2, 2, 4]


def test_order_of_use_is_exact_against_a_list(tmp_path: Path) -> None:
    draw = random.Random(3)
    order: list[int] = []
    with PrefixStore(tmp_path / "store", capacity(4, 4)) as store:
        for _ in range(300):
            number = draw.randrange(7)
            expected = number in order
            assert get(store, prompt(1, number)) == expected
            if expected:
                order.remove(number)
            else:
                put(store, prompt(1, number))
                order = order[-3:]
            order.append(number)


def test_capacity_is_never_exceeded_and_too_much_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(3, 1)) as store:
        report = put(store, prompt(5))
        assert (report.stored_blocks, report.written_nbytes) == (0, 0)
        assert "give the store more capacity" in report.reason
        assert put(store, prompt(3)).stored_blocks == 3
        assert put(store, prompt(4), first=3).reason  # what it follows may not go for it
        assert get(store, prompt(4)) == 3
        assert store.statistics().used_nbytes == capacity(3, 1)
        assert used(folder) <= capacity(3, 1)
    with pytest.raises(UsageError, match="holds nothing"):
        PrefixStore(tmp_path / "small", 4096)


def test_what_follows_nothing_is_not_stored(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", LARGE) as store:
        report = put(store, prompt(3), first=2)
        assert report.stored_blocks == 0
        assert "block 0" in report.reason
        with pytest.raises(UsageError, match="give the tokens of all blocks"):
            store.put(IDENTITY, prompt(1), [b"x", b"y"])
        with pytest.raises(UsageError, match="may be empty"):
            store.put(IDENTITY, prompt(1), [b""])


def test_a_block_without_tokens_is_refused(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", LARGE) as store:
        for size in (0, -4):
            identity = dataclasses.replace(IDENTITY, block_tokens=size)
            for tokens in ([], prompt(2)):
                with pytest.raises(UsageError, match="at least one token"):
                    store.lookup(identity, tokens)
                with pytest.raises(UsageError, match="at least one token"):
                    store.put(identity, tokens, [b"x"])


@pytest.mark.parametrize("lose", [Index.hide, Index.remove])
def test_a_block_that_two_segments_have_is_found_in_the_other_one(lose: Callable[[Index, str], None]) -> None:
    keys = list(chain(IDENTITY, prompt(6)))
    index = Index()

    def add(name: str, numbers: range) -> None:
        blocks = place_blocks([keys[number] for number in numbers], [8] * len(numbers), [0] * len(numbers))
        parent = keys[numbers[0] - 1] if numbers[0] else IDENTITY.root()
        record = SegmentRecord(
            name=name, root=IDENTITY.root(), parent=parent, first=numbers[0], block_tokens=TOKENS, blocks=blocks
        )
        index.add(record, name, 1)

    def found() -> str:
        return "".join(place.segment for place in index.find(keys))

    for name, numbers in (("a", range(4)), ("b", range(2, 6)), ("c", range(3)), ("d", range(1, 3))):
        add(name, numbers)
    assert found() == "aaaabb"
    lose(index, "d")
    lose(index, "a")
    assert found() == "ccbbbb"
    lose(index, "b")
    assert found() == "ccc"
    lose(index, "c")
    assert found() == ""
    assert index.places == {}


def test_long_prompts_become_several_segments(tmp_path: Path) -> None:
    tokens = prompt(2 * MOST_BLOCKS + 3)
    with PrefixStore(tmp_path / "store", LARGE) as store:
        put(store, tokens, nbytes=10)
        assert len(segments(store.folder)) == 3
        assert get(store, tokens, nbytes=10) == 2 * MOST_BLOCKS + 3
    with PrefixStore(tmp_path / "store", readonly=True) as store:
        assert get(store, tokens, nbytes=10) == 2 * MOST_BLOCKS + 3


def test_readers_see_what_is_written_and_what_goes(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(1, 1)) as writer, PrefixStore(folder, readonly=True) as reader:
        put(writer, prompt(1, 1))
        assert get(reader, prompt(1, 1)) == 1
        hit = reader.lookup(IDENTITY, prompt(1, 1))
        put(writer, prompt(1, 2))  # in its place
        assert read(reader, hit) == []
        assert (get(reader, prompt(1, 1)), get(reader, prompt(1, 2))) == (0, 1)
        assert reader.statistics().bad_segments == 0
        with pytest.raises(StoreError, match="opened for reading"):
            put(reader, prompt(1))
        with pytest.raises(StoreError, match="opened for reading"):
            reader.remove_unreachable()


def test_a_use_by_a_reader_counts(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(2, 2)) as store:
        put(store, prompt(1, 1))
        put(store, prompt(1, 2))
    with PrefixStore(folder, readonly=True) as reader:
        assert get(reader, prompt(1, 1)) == 1
    with PrefixStore(folder) as store:
        put(store, prompt(1, 3))
        assert [get(store, prompt(1, seed)) for seed in (1, 2, 3)] == [1, 0, 1]


def test_a_reader_that_was_opened_long_ago_sets_nothing_back(tmp_path: Path) -> None:
    """Its count is behind. The hottest beginning, which it uses too, is the last one to go."""
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(3, 3)) as writer:
        put(writer, prompt(1, 1))
        with PrefixStore(folder, readonly=True) as reader:
            for _ in range(10):
                put(writer, prompt(1, 2))
                assert (get(writer, prompt(1, 2)), get(writer, prompt(1, 1))) == (1, 1)
            path = folder / writer.lookup(IDENTITY, prompt(1, 1)).places[0].segment
            before = path.stat().st_mtime
            assert get(reader, prompt(1, 1)) == 1
            assert path.stat().st_mtime > before
    with PrefixStore(folder, capacity(1, 1)) as writer:
        assert [get(writer, prompt(1, seed)) for seed in (1, 2)] == [1, 0]


def test_a_use_by_a_reader_counts_for_one_who_writes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(2, 2)) as writer:
        put(writer, prompt(1, 1))
        put(writer, prompt(1, 2))
        with PrefixStore(folder, readonly=True) as reader:
            assert get(reader, prompt(1, 1)) == 1
            put(writer, prompt(1, 3))
            assert [get(reader, prompt(1, seed)) for seed in (1, 2, 3)] == [1, 0, 1]
            # What the one who writes uses from now on is later than what it heard of.
            assert [get(writer, prompt(1, seed)) for seed in (1, 3)] == [1, 1]
            put(writer, prompt(1, 4))
            assert [get(writer, prompt(1, seed)) for seed in (1, 3, 4)] == [0, 1, 1]


def test_one_writes_and_the_second_is_told_who(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE), pytest.raises(StoreBusyError, match=rf"pid {os.getpid()}.*readonly=True"):
        PrefixStore(folder)
    PrefixStore(folder).close()
    lost = PrefixStore(folder)
    del lost  # a store that nobody has any more is closed
    store = PrefixStore(folder)
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.lookup(IDENTITY, prompt(1))


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o750)
    with pytest.raises(StoreError, match="chmod 700"):
        PrefixStore(open_to_all, LARGE)
    full = tmp_path / "full"
    full.mkdir(mode=0o700)
    (full / "thesis.tex").write_text("everything")
    with pytest.raises(StoreError, match=r"not empty \(1 files, thesis.tex"):
        PrefixStore(full, LARGE)
    assert os.listdir(full) == ["thesis.tex"]
    with pytest.raises(StoreError, match="no prefix store"):
        PrefixStore(tmp_path / "none", readonly=True)
    with pytest.raises(UsageError, match="needs a capacity"):
        PrefixStore(tmp_path / "none")
    with pytest.raises(UsageError, match="leave capacity out"):
        PrefixStore(tmp_path / "none", 1, readonly=True)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_was_copied_goes_on(tmp_path: Path) -> None:
    """Its files have the times of the copying, which are taken for ticks in the order of copying, and counted anew."""
    folder = tmp_path / "store"
    with PrefixStore(folder, capacity(3, 3)) as store:
        for seed in range(3):
            put(store, prompt(1, seed))
        names = {seed: store.lookup(IDENTITY, prompt(1, seed)).places[0].segment for seed in range(3)}
    for seed, age in ((1, 30), (0, 20), (2, 10)):
        os.utime(folder / names[seed], (1.8e9 - age, 1.8e9 - age))
    with PrefixStore(folder) as store:
        assert max(path.stat().st_mtime for path in segments(folder)) == 3
        put(store, prompt(1, 3))
        assert [get(store, prompt(1, seed)) for seed in range(4)] == [1, 0, 1, 1]


def test_a_forked_child_is_refused_and_leaves_the_lock(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", LARGE) as store:
        pid = os.fork()
        if pid == 0:
            try:
                store.lookup(IDENTITY, prompt(1))
            except ForkError:
                store.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert (tmp_path / "store" / "penstock-prefixes.lock").exists()


def test_views_that_are_too_short_are_refused(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", LARGE) as store:
        put(store, prompt(1))
        hit = store.lookup(IDENTITY, prompt(1))
        assert hit.nbytes == NBYTES
        with pytest.raises(UsageError, match=f"needs {BLOCK_NBYTES} writable bytes"):
            store.read(hit, [memoryview(bytearray(NBYTES))])
        with pytest.raises(UsageError, match="give one for each"):
            store.read(hit, [])
        plain = bytearray(BLOCK_NBYTES)  # on no page boundary: slower, and right
        assert store.read(hit, [memoryview(plain)]) == 1
        assert plain[:NBYTES] == payload(IDENTITY, prompt(1), 0)


def test_several_threads_may_use_it(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            draw = random.Random(number)
            for _ in range(30):
                tokens = prompt(2, draw.randrange(6))
                get(store, tokens)
                put(store, tokens)
        except Exception as error:
            failures.append(error)

    with PrefixStore(tmp_path / "store", capacity(6, 3)) as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert used(store.folder) <= store.capacity_nbytes
        assert store.statistics().bad_segments == 0


def test_tools_count_check_and_prune(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with PrefixStore(folder, LARGE) as store:
        put(store, prompt(2))
        put(store, prompt(4), first=2)
        put(store, prompt(1, 9), dataclasses.replace(IDENTITY, salt="s"))
        figures = stats(folder)
        assert (figures.segments, figures.blocks, figures.tokens, figures.identities) == (3, 5, 5 * TOKENS, 2)
        assert (figures.payload_nbytes, figures.used_nbytes) == (5 * NBYTES, store.statistics().used_nbytes)
        report = verify(folder)
        assert (report.good, report.blocks, report.nbytes) == (True, 5, 5 * NBYTES)
        beginning = store.lookup(IDENTITY, prompt(2)).places[0].segment
    (folder / beginning).unlink()
    (folder / ("0" * 32 + ".kv.new")).write_bytes(b"x")
    assert (stats(folder).unreachable_segments, stats(folder).left_over_files) == (1, 1)
    pruned = prune(folder)
    assert (pruned.removed_segments, pruned.left_over_files) == (1, 1)
    assert pruned.freed_nbytes == SEGMENT_NBYTES + BLOCK_NBYTES
    assert prune(folder, capacity(1, 1)).capacity_nbytes == stats(folder).capacity_nbytes == capacity(1, 1)
    for tool in (stats, verify, prune):
        with pytest.raises(StoreError, match="no prefix store"):
            tool(tmp_path)


def test_the_public_name_takes_sizes(tmp_path: Path) -> None:
    with penstock.PrefixStore(tmp_path / "store", "1MiB") as store:
        assert store.capacity_nbytes == 2**20
        put(store, prompt(1))
    with pytest.raises(UsageError, match="GiB"):
        penstock.PrefixStore(tmp_path / "other", "8G")
