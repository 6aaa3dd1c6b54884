"""The block table and its tiers against lists of tokens, in any order of all that can happen."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_memory import Memory, Token

from penstock.memory.errors import DoesNotFitError, UsageError
from penstock.scheduler.kv.moves import Move
from penstock.scheduler.kv.orders import Cyclic, Recent
from penstock.scheduler.kv.shape import KvShape, LayerGroup, cut_groups
from penstock.scheduler.kv.table import BlockTable
from penstock.scheduler.kv.tiers import Tier, Tiers
from penstock.scheduler.kv.writes import Write

SIZE = 4
PAGE = 4096


def shape(groups: int = 2, size: int = SIZE) -> KvShape:
    return KvShape(
        groups=tuple(LayerGroup(layers=(group,), token_nbytes=16) for group in range(groups)), block_tokens=size
    )


def tiers(*slots: int) -> Tiers:
    names = ("device", "host", "disk")
    return Tiers([Tier(name=name, budget_nbytes=n * PAGE) for name, n in zip(names, slots, strict=False)], PAGE)


class Machine(RuleBasedStateMachine):
    """The reference is a list of tokens for each row and group, and a count of rows for each block."""

    @initialize(
        budgets=st.lists(st.integers(2, 14), min_size=1, max_size=3),
        paddings=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    )
    def start(self, budgets: list[int], paddings: list[int]) -> None:
        self.budgets = budgets
        self.table = BlockTable(shape(), tiers(*budgets), paddings)
        self.tiers = self.table.tiers
        self.memory = Memory(self.table)
        self.cyclic = Cyclic(self.table)
        self.rows: list[list[list[Token]]] = [[[], []] for _ in paddings]
        self.paddings = list(paddings)
        self.lengths = [0, 0]
        self.under_way: list[Move] = []
        self.pinned: list[tuple[int, int, list[Token]]] = []
        self.sealed: dict[int, list[Token]] = {}
        self.count = 0
        self.dirty: set[int] = set()
        self.copying: list[tuple[Write, list[Token]]] = []

    @rule(group=st.integers(0, 1), tokens=st.integers(1, 11))
    def append(self, group: int, tokens: int) -> None:
        self.cyclic.now = group
        missing = self.table.missing(group, tokens)
        before = self.table.parts(0, group)
        if missing > self.tiers.free(0):
            with pytest.raises(DoesNotFitError):
                self.table.append(group, tokens)
            assert self.table.parts(0, group) == before
            return
        values = [[(self.count, row, at) for at in range(tokens)] for row in range(len(self.rows))]
        self.count += 1
        free = self.tiers.free(0)
        writes = self.table.append(group, tokens)
        self.memory.write(writes, values)
        self.copying += [(write, self.memory.source(write)) for write in writes if write.copied_from is not None]
        assert self.tiers.free(0) == free - missing
        for row, padding in enumerate(self.paddings):
            self.rows[row][group] += values[row][max(0, min(tokens, padding - self.lengths[group])) :]
        self.lengths[group] += tokens
        if writes:
            self.dirty.add(group)

    @rule()
    def settle(self) -> None:
        for group in (0, 1):
            for block in self.table.settle(group):
                slot = self.tiers.slot(block, 0)
                assert slot is not None
                self.sealed[block] = list(self.memory.slots[0, slot])
                assert len(self.sealed[block]) == SIZE
        self.dirty.clear()
        self.copying.clear()

    @precondition(lambda self: not self.dirty)
    @rule(positions=st.integers(0, 40))
    def crop(self, positions: int) -> None:
        self.table.crop(positions)
        longest = max(self.lengths)
        self.lengths = [min(length, positions) for length in self.lengths]
        for row, padding in enumerate(self.paddings):
            for group in (0, 1):
                del self.rows[row][group][max(0, positions - padding) :]
        if positions < longest:
            self.paddings = [min(padding, positions) for padding in self.paddings]

    @precondition(lambda self: not self.dirty)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        sources = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.table.reorder(sources)
        self.rows = [[list(self.rows[source][group]) for group in (0, 1)] for source in sources]
        self.paddings = [self.paddings[source] for source in sources]

    @precondition(lambda self: self.dirty)
    @rule()
    def nothing_else_meanwhile(self) -> None:
        with pytest.raises(UsageError):
            self.table.crop(0)
        with pytest.raises(UsageError):
            self.table.reorder([0])

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.rows = [[[], []] for _ in self.rows]
        if any(self.lengths):
            self.paddings = [0 for _ in self.paddings]
        self.lengths = [0, 0]
        self.dirty.clear()
        self.copying.clear()

    @rule(data=st.data(), slots=st.integers(1, 6))
    def room(self, data: st.DataObject, slots: int) -> None:
        tier = data.draw(st.integers(0, len(self.budgets) - 1))
        free = self.tiers.free(tier)
        try:
            moves = self.tiers.make_room(tier, slots, self.cyclic.farness)
        except DoesNotFitError:
            assert self.tiers.free(tier) == free < slots
            return
        self.under_way += moves
        read = Counter((move.block, move.source) for move in self.under_way)
        read.update((block, where) for block, where, _ in self.pinned)
        read.update((write.copied_from, write.source_tier) for write, _ in self.copying)
        leaving = sum(move.leaves and move.source == tier and read[move.block, tier] == 1 for move in self.under_way)
        assert self.tiers.free(tier) + leaving >= slots

    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        tier = data.draw(st.integers(0, len(self.budgets) - 1))
        able = [
            block
            for block in self.sealed
            if self.table.has(block) and self.tiers.slot(block, tier) is None and not self.tiers.arriving(block, tier)
        ]
        if not able:
            return
        block = data.draw(st.sampled_from(able))
        if not self.tiers.free(tier):
            with pytest.raises(DoesNotFitError):
                self.tiers.copy(block, tier)
            return
        self.under_way.append(self.tiers.copy(block, tier))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data: st.DataObject, failed: bool) -> None:
        move = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.memory.finish(move, failed=failed)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        alive = [block for block in self.sealed if self.table.has(block)]
        if alive:
            block = data.draw(st.sampled_from(alive))
            tier = self.tiers.fastest(block)
            self.tiers.pin(block, tier)
            self.pinned.append((block, tier, self.sealed[block]))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        block, tier, content = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        slot = self.tiers.slot(block, tier)
        assert slot is not None
        assert self.memory.slots[tier, slot] == content
        self.tiers.unpin(block, tier)

    @invariant()
    def rows_are_what_was_appended(self) -> None:
        for row, groups in enumerate(getattr(self, "rows", [])):
            for group in (0, 1):
                assert self.memory.read(row, group) == groups[group]

    @invariant()
    def what_is_being_copied_stays_where_it_is(self) -> None:
        """Layer by layer, until all of the group are copied."""
        for write, before in getattr(self, "copying", []):
            assert write.copied_from is not None
            assert write.source_tier is not None
            assert self.tiers.slot(write.copied_from, write.source_tier) == write.source_slot
            assert self.memory.source(write) == before

    @invariant()
    def counts_are_exact(self) -> None:
        if not hasattr(self, "table"):
            return
        held = Counter(
            part.block for row in range(self.table.rows) for group in (0, 1) for part in self.table.parts(row, group)
        )
        for block, rows in held.items():
            assert self.table.block(block).rows == rows
        statistics = self.table.statistics()
        assert statistics.tokens == sum(len(tokens) for row in self.rows for tokens in row)
        assert statistics.shared_blocks == sum(rows > 1 for rows in held.values())
        if not self.dirty:
            assert statistics.blocks == len(held)

    @invariant()
    def slots_are_exact(self) -> None:
        if not hasattr(self, "table"):
            return
        for tier, found in enumerate(self.tiers.statistics()):
            assert found.used_nbytes <= found.budget_nbytes
            ready = sum(self.tiers.slot(block, tier) is not None for block in self.tiers.blocks())
            arriving = sum(move.target == tier for move in self.under_way)
            assert found.used_nbytes == (ready + arriving) * PAGE
            slots = [s for block in self.tiers.blocks() if (s := self.tiers.slot(block, tier)) is not None]
            slots += [move.target_slot for move in self.under_way if move.target == tier]
            assert len(set(slots)) == len(slots)
            assert all(0 <= slot < found.budget_nbytes // PAGE for slot in slots)

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.clear()
        for move in self.under_way:
            self.memory.finish(move, failed=False)
        for block, tier, _ in self.pinned:
            self.tiers.unpin(block, tier)
        assert [found.used_nbytes for found in self.tiers.statistics()] == [0] * len(self.budgets)
        assert not self.tiers.blocks()
        assert self.table.statistics().blocks == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_beams_share_sealed_blocks_and_copy_tails_once() -> None:
    table = BlockTable(shape(groups=1), tiers(20), [0])
    table.append(0, 2 * SIZE + 2)
    table.settle(0)
    table.reorder([0, 0, 0])
    assert table.statistics().blocks == 3
    assert table.missing(0, 1) == 2  # three rows, one of which goes on in the tail
    writes = table.append(0, 1)
    assert [write.copied_from for write in writes] == [2, 2, None]
    assert [(write.start, write.tokens, write.position) for write in writes] == [(2, 1, 0)] * 3
    table.settle(0)
    assert table.statistics().shared_blocks == 2
    assert table.statistics().copied_nbytes == 2 * 2 * 16
    assert table.statistics().written_nbytes == (2 * SIZE + 2 + 3) * 16


def test_a_crop_into_a_sealed_block_goes_on_in_a_copy() -> None:
    table = BlockTable(shape(groups=1), tiers(20), [0])
    table.append(0, 2 * SIZE)
    assert table.settle(0) == (0, 1)
    table.crop(SIZE + 1)
    (write,) = table.append(0, 1)
    assert (write.block, write.copied_from, write.start) == (2, 1, 1)
    assert table.has(1)  # until it is copied
    table.settle(0)
    assert not table.has(1)


def test_what_is_being_copied_keeps_its_slot_until_it_is_settled() -> None:
    """It is sealed, and clean: else it would be the first to go."""
    table = BlockTable(shape(groups=1), tiers(3, 3), [0])
    order = Cyclic(table)
    table.append(0, 2 * SIZE)
    table.settle(0)
    table.tiers.finish(table.tiers.copy(1, 1))
    table.crop(SIZE + 1)
    (write,) = table.append(0, 1)
    assert (write.copied_from, write.source_tier, write.source_slot) == (1, 0, table.tiers.slot(1, 0))
    (move,) = table.tiers.make_room(0, 1, order.farness)
    assert move.block == 0
    assert table.tiers.slot(1, 0) == write.source_slot
    table.settle(0)
    assert table.tiers.slot(0, 0) is not None
    assert not table.has(1)
    assert 1 not in table.tiers.blocks()


def test_what_is_being_copied_from_a_slower_tier_stays_there() -> None:
    table = BlockTable(shape(groups=1), tiers(2, 3), [0])
    order = Cyclic(table)
    table.append(0, SIZE)
    table.settle(0)
    for move in table.tiers.make_room(0, 2, order.farness):
        table.tiers.finish(move)
    table.crop(1)
    (write,) = table.append(0, 1)
    assert (write.source_tier, write.source_slot) == (1, table.tiers.slot(0, 1))
    assert table.tiers.statistics()[1].pinned_nbytes == PAGE
    table.clear()
    assert table.tiers.blocks() == ()


def test_padding_takes_no_bytes_and_blocks_begin_with_the_sequence() -> None:
    table = BlockTable(shape(groups=1), tiers(20), [0, 9])
    writes = table.append(0, 10)
    assert [(w.row, w.position, w.tokens) for w in writes] == [(0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 9, 1)]
    assert [(part.position, part.tokens) for part in table.parts(1, 0)] == [(9, 1)]
    assert table.statistics().written_nbytes == 11 * 16


def test_clean_blocks_are_dropped_and_dirty_ones_written_once() -> None:
    table = BlockTable(shape(groups=1), tiers(3, 8), [0])
    order = Cyclic(table)
    table.append(0, 3 * SIZE)
    table.settle(0)
    moves = table.tiers.make_room(0, 3, order.farness)
    assert [move.block for move in moves] == [2, 1, 0]  # read last, so needed last
    assert table.tiers.make_room(0, 3, order.farness) == ()  # they are on their way out
    for move in moves:
        table.tiers.finish(move)
    for block in (0, 1):
        table.tiers.finish(table.tiers.copy(block, 0))
    assert table.tiers.make_room(0, 3, order.farness) == ()
    device, host = table.tiers.statistics()
    assert (device.dropped_nbytes, device.used_nbytes, host.arrived_nbytes) == (2 * PAGE, 0, 3 * PAGE)


def belady(uses: list[int], room: int) -> int:
    """Hits where whoever is needed last goes, and all that is used is brought."""
    held: set[int] = set()
    hits = 0
    for at, block in enumerate(uses):
        hits += block in held
        if block not in held and len(held) == room:
            held.remove(max(held, key=lambda one: (uses[at:] + list(range(6))).index(one)))
        held.add(block)
    return hits


def test_a_fixed_part_stays_under_a_scan() -> None:
    table = BlockTable(shape(groups=6), tiers(6, 6), [0])
    order = Cyclic(table)
    for group in range(6):
        table.append(group, SIZE)
        table.settle(group)
        table.tiers.finish(table.tiers.copy(group, 1))
    table.tiers.make_room(0, 6, order.farness)
    hits = 0
    for group in list(range(6)) * 20:
        order.now = group - 1  # what was used last
        if table.tiers.slot(group, 0) is not None:
            hits += 1
            continue
        table.tiers.make_room(0, 3, order.farness)  # never more than four
        table.tiers.finish(table.tiers.copy(group, 0))
    assert hits == belady(list(range(6)) * 20, 4) == 69


def test_recent_evicts_what_was_chosen_longest_ago() -> None:
    order = Recent()
    for block in (5, 3, 5, 4):
        order.used(block)
    assert sorted((5, 3, 4, 9), key=order.farness, reverse=True) == [9, 3, 5, 4]
    order.forget(lambda block: block != 3)
    assert order.farness(3) == order.farness(9)


def test_room_that_cannot_be_made_is_refused_and_says_what_to_change() -> None:
    table = BlockTable(shape(groups=1), tiers(2, 1), [0])
    table.append(0, 2 * SIZE)
    order = Cyclic(table)
    with pytest.raises(DoesNotFitError, match=r"2 still grow; host has 1 slots free\. Raise the budget"):
        table.tiers.make_room(0, 1, order.farness)
    table.settle(0)
    with pytest.raises(DoesNotFitError, match="prefill_chunk_size"):
        table.tiers.make_room(0, 2, order.farness)
    assert len(table.tiers.make_room(0, 1, order.farness)) == 1
    with pytest.raises(DoesNotFitError, match="device tier"):
        tiers(0, 5)


def test_groups_are_worth_a_request_and_two_of_them_fit() -> None:
    layers = [(layer, 4096) for layer in range(32)]  # 8 heads of 128 in 16 bits
    cut = cut_groups(layers, context_tokens=8192, room_nbytes=2**30)
    assert [len(group.layers) for group in cut.groups] == [4] * 8
    assert cut.slot_nbytes == 2**20
    assert cut.token_nbytes == 32 * 4096
    single = cut_groups(layers, context_tokens=131072, room_nbytes=2**30)
    assert [group.layers for group in single.groups] == [(layer,) for layer in range(32)]
    uneven = cut_groups(layers[:7], context_tokens=1, room_nbytes=2**30)
    assert [len(group.layers) for group in uneven.groups] == [3, 4]
    with pytest.raises(UsageError, match="0 layers"):
        cut_groups([], context_tokens=1, room_nbytes=1)
    with pytest.raises(UsageError, match="at least a token"):
        KvShape(groups=shape().groups, block_tokens=0)


def test_a_copy_that_is_pinned_on_its_way_out_stays() -> None:
    table = BlockTable(shape(groups=1), tiers(2, 2), [0])
    table.append(0, SIZE)
    table.settle(0)
    (move,) = table.tiers.make_room(0, 2, Cyclic(table).farness)
    assert table.tiers.pin(0, 0) == move.source_slot
    table.tiers.finish(move)
    assert (table.tiers.slot(0, 0), table.tiers.slot(0, 1)) == (move.source_slot, move.target_slot)
    table.tiers.unpin(0, 0)
    assert table.tiers.make_room(0, 2, Cyclic(table).farness) == ()  # it is clean now
    assert table.tiers.slot(0, 0) is None


def test_a_copy_that_was_pinned_on_its_way_out_is_no_room() -> None:
    table = BlockTable(shape(groups=1), tiers(2, 3), [0])
    order = Cyclic(table)
    table.append(0, 2 * SIZE)
    table.settle(0)
    (leaving,) = table.tiers.make_room(0, 1, order.farness)
    assert leaving.block == 1
    assert table.tiers.make_room(0, 1, order.farness) == ()
    table.tiers.pin(1, 0)
    (other,) = table.tiers.make_room(0, 1, order.farness)
    assert other.block == 0
    with pytest.raises(DoesNotFitError):
        table.tiers.make_room(0, 2, order.farness)
    table.tiers.finish(leaving)
    table.tiers.finish(other)
    assert table.tiers.free(0) == 1


def test_a_copy_in_a_faster_tier_does_not_make_one_clean() -> None:
    """Else the faster one would have to be written again."""
    table = BlockTable(shape(groups=1), tiers(2, 1, 1), [0])
    table.append(0, SIZE)
    table.settle(0)
    table.tiers.finish(table.tiers.copy(0, 1))
    (move,) = table.tiers.make_room(1, 1, Cyclic(table).farness)
    assert (move.source, move.target, move.leaves) == (1, 2, True)


def test_a_copy_that_is_being_made_is_not_made_twice() -> None:
    table = BlockTable(shape(groups=1), tiers(2, 1, 2), [0])
    table.append(0, SIZE)
    table.settle(0)
    table.tiers.finish(table.tiers.copy(0, 1))
    on_its_way = table.tiers.copy(0, 2)
    assert on_its_way.source == 0
    with pytest.raises(DoesNotFitError):
        table.tiers.make_room(1, 1, Cyclic(table).farness)
    table.tiers.finish(on_its_way)
    assert table.tiers.make_room(1, 1, Cyclic(table).farness) == ()  # dropped


def test_what_is_read_stays_after_its_last_row_is_gone() -> None:
    table = BlockTable(shape(groups=1), tiers(2), [0])
    table.append(0, SIZE)
    table.settle(0)
    slot = table.tiers.pin(0, 0)
    table.clear()
    assert not table.has(0)
    assert (table.tiers.free(0), table.tiers.slot(0, 0)) == (1, slot)
    table.tiers.unpin(0, 0)
    assert (table.tiers.free(0), table.tiers.blocks()) == (2, ())


def test_the_last_block_of_a_row_is_told_while_the_row_has_a_part_of_it() -> None:
    table = BlockTable(shape(1), tiers(8), [0, 3])
    assert [table.last(row, 0) for row in (0, 1)] == [None, None]
    table.append(0, 6)
    table.settle(0)
    assert [table.last(row, 0) for row in (0, 1)] == [table.parts(0, 0)[-1], table.parts(1, 0)[-1]]
    table.append(0, 2)
    table.settle(0)
    assert table.last(0, 0) is None
    table.crop(5)
    assert table.last(0, 0) == table.parts(0, 0)[-1]


def test_padding_may_become_known_in_pieces_but_not_after_tokens() -> None:
    table = BlockTable(shape(1), tiers(8), [3, 0])
    table.append(0, 3)
    table.settle(0)
    table.pad(0, 5)
    assert table.padding(0) == 5
    with pytest.raises(UsageError, match="row 1 has tokens after 0 positions"):
        table.pad(1, 2)
    with pytest.raises(UsageError, match="row 0 has tokens after 5"):
        table.pad(0, 4)
    table.append(0, 3)
    table.settle(0)
    assert [part.tokens for part in table.parts(0, 0)] == [1]
    table.crop(4)
    assert (table.padding(0), table.padding(1)) == (4, 0), "what was cropped may come as tokens"
    table.append(0, 2)
    table.settle(0)
    assert [part.tokens for part in table.parts(0, 0)] == [2]


def test_rows_that_are_alike_have_the_same_blocks_and_padding() -> None:
    table = BlockTable(shape(1), tiers(16), [0, 0, 2, 2])
    assert table.alike() == (0, 0, 2, 2)
    table.append(0, 6)
    table.settle(0)
    assert table.alike() == (0, 1, 2, 3)
    table.reorder([1, 0, 1, 3])
    assert table.alike() == (0, 1, 0, 3)
    table.append(0, 1)
    table.settle(0)
    assert table.alike() == (0, 1, 2, 3)
