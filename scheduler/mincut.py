"""The cheapest cut between a source and a sink of a directed graph: Dinic's blocking flows (1970)."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Final

EPSILON: Final = 1e-9
"""Of the largest finite capacity: what is left of one below that is nothing."""


class FlowNetwork:
    """A graph whose edges have capacities.

    Args:
        nodes: How many; they are numbered from 0.
    """

    def __init__(self, nodes: int) -> None:
        self._leaving: list[list[int]] = [[] for _ in range(nodes)]
        self._heads: list[int] = []
        self._left: list[float] = []
        """Capacity of each edge that is not used; edges 2 n and 2 n + 1 are one in both directions."""
        self._largest = 0.0

    def connect(self, tail: int, head: int, capacity: float) -> None:
        """Add an edge; infinite capacities are never cut."""
        assert capacity >= 0, capacity
        for start, end, amount in ((tail, head, capacity), (head, tail, 0.0)):
            self._leaving[start].append(len(self._heads))
            self._heads.append(end)
            self._left.append(amount)
        if capacity < inf:
            self._largest = max(self._largest, capacity)

    def source_side(self, source: int, sink: int) -> frozenset[int]:
        """The nodes on the source's side of a cheapest cut, as few as can be. Some cut is finite. Called once."""
        while (levels := self._levels(source))[sink] >= 0:
            turn = [0] * len(self._leaving)
            while path := self._path(source, sink, levels, turn):
                amount = min(self._left[edge] for edge in path)
                assert amount < inf, "there is no finite cut"
                for edge in path:
                    self._left[edge] -= amount
                    self._left[edge ^ 1] += amount
        return frozenset(node for node, level in enumerate(levels) if level >= 0)

    def _open(self, edge: int) -> bool:
        return self._left[edge] > EPSILON * self._largest

    def _levels(self, source: int) -> list[int]:
        """Edges from the source to each node, along open ones; -1 where there is no way."""
        levels = [-1] * len(self._leaving)
        levels[source] = 0
        waiting = deque([source])
        while waiting:
            node = waiting.popleft()
            for edge in self._leaving[node]:
                if levels[self._heads[edge]] < 0 and self._open(edge):
                    levels[self._heads[edge]] = levels[node] + 1
                    waiting.append(self._heads[edge])
        return levels

    def _path(self, source: int, sink: int, levels: list[int], turn: list[int]) -> list[int]:
        """Edges of a way to the sink, each one level further on; none where there is no more. `turn`: the first edge of
        each node that may still be of use."""
        path: list[int] = []
        node = source
        while node != sink:
            for place in range(turn[node], len(self._leaving[node])):
                edge = self._leaving[node][place]
                if self._open(edge) and levels[self._heads[edge]] == levels[node] + 1:
                    turn[node] = place
                    path.append(edge)
                    node = self._heads[edge]
                    break
            else:
                turn[node] = len(self._leaving[node])
                if not path:
                    return []
                edge = path.pop()
                node = self._heads[edge ^ 1]
                turn[node] += 1
        return path
