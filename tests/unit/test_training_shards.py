"""Shards: every element of every parameter once, within one block, cut at whole pages."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.training.shards import GRAIN, cut_shards


@given(
    sizes=st.lists(st.integers(0, 5 * GRAIN), min_size=1, max_size=12),
    most=st.integers(1, 4),
    blocks=st.integers(1, 4),
)
def test_every_element_is_in_one_shard_of_its_block(sizes: list[int], most: int, blocks: int) -> None:
    homes = {block: [i for i in range(len(sizes)) if i % blocks == block] for block in range(blocks)}
    shards = cut_shards(sizes, homes, most=most * GRAIN)
    assert [shard.id for shard in shards] == list(range(len(shards)))
    seen: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(sizes))}
    for shard in shards:
        end = 0
        for piece in shard.pieces:
            assert piece.parameter in homes[shard.block]
            assert piece.at >= end
            assert piece.at % GRAIN == 0
            assert piece.start % GRAIN == 0
            assert piece.elements > 0
            end = piece.at + piece.elements
            seen[piece.parameter].append((piece.start, piece.stop))
        assert shard.elements == end <= most * GRAIN
        assert shard.array_nbytes >= 4 * end
        assert shard.array_nbytes % 4096 == 0
    for index, spans in seen.items():
        at = 0
        for start, stop in spans:  # in order, without gaps
            assert start == at
            at = stop
        assert at == sizes[index]


def test_a_large_parameter_is_cut_and_small_ones_share() -> None:
    shards = cut_shards([3 * GRAIN, 10, 20], {4: [0], 7: [1, 2]}, most=2 * GRAIN)
    assert [(s.block, [(p.parameter, p.start, p.stop, p.at) for p in s.pieces]) for s in shards] == [
        (4, [(0, 0, 2 * GRAIN, 0)]),
        (4, [(0, 2 * GRAIN, 3 * GRAIN, 0)]),
        (7, [(1, 0, 10, 0), (2, 0, 20, GRAIN)]),
    ]


@given(
    experts=st.integers(2, 9),
    each=st.integers(1, 3 * GRAIN),
    most=st.integers(1, 2),
)
def test_a_shard_has_elements_of_one_expert_but_for_what_a_cut_at_whole_pages_leaves(
    experts: int, each: int, most: int
) -> None:
    sizes = [10, experts * each, 20]
    shards = cut_shards(sizes, {1: [0, 1, 2]}, most=most * GRAIN, experts=[0, experts, 0])
    assert [shard.id for shard in shards] == list(range(len(shards)))
    assert [
        (piece.parameter, piece.start, piece.stop) for shard in (shards[0], shards[-1]) for piece in shard.pieces
    ] == [
        (0, 0, 10),
        (2, 0, 20),
    ]
    at = 0
    for shard in shards[1:-1]:
        (piece,) = shard.pieces
        assert (piece.parameter, piece.start, piece.at) == (1, at, 0)
        assert 0 < piece.elements <= most * GRAIN
        assert at % GRAIN == 0
        at = piece.stop
        foreign = [
            min(at, (expert + 1) * each) - max(piece.start, expert * each)
            for expert in range(experts)
            if expert * each < at and piece.start < (expert + 1) * each
        ]
        assert sum(foreign) - max(foreign) <= GRAIN or each < GRAIN
    assert at == experts * each


def test_shards_of_a_large_expert_are_of_like_size() -> None:
    shards = cut_shards([2 * 11 * GRAIN], {1: [0]}, most=10 * GRAIN, experts=[2])
    assert [(p.start // GRAIN, p.stop // GRAIN) for s in shards for p in s.pieces] == [
        (0, 6),
        (6, 11),
        (11, 17),
        (17, 22),
    ]
