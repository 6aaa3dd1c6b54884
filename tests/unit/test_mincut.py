"""Cheapest cuts, against all cuts of small graphs."""

from __future__ import annotations

import itertools
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.mincut import FlowNetwork

NODES = 6
EDGES = st.lists(
    st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0, inf])),
    max_size=14,
)


def cost(side: frozenset[int], edges: list[tuple[int, int, float]]) -> float:
    return sum(capacity for tail, head, capacity in edges if tail in side and head not in side)


@settings(max_examples=300, deadline=None)
@given(EDGES)
def test_the_cut_is_one_of_the_cheapest_and_the_smallest_of_these(edges: list[tuple[int, int, float]]) -> None:
    between = [frozenset({0, *some}) for n in range(5) for some in itertools.combinations(range(1, NODES - 1), n)]
    best = min(cost(side, edges) for side in between)
    if best == inf:
        return
    network = FlowNetwork(NODES)
    for edge in edges:
        network.connect(*edge)
    found = network.source_side(0, NODES - 1)
    assert cost(found, edges) == pytest.approx(best)
    assert all(found <= side for side in between if cost(side, edges) == pytest.approx(best, abs=1e-6))


def test_a_long_chain_is_no_matter_of_recursion() -> None:
    network = FlowNetwork(5002)
    for node in range(5001):
        network.connect(node, node + 1, 1.0 if node == 4000 else 2.0)
    assert network.source_side(0, 5001) == frozenset(range(4001))
