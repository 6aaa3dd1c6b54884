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
