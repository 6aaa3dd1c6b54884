"""Spans laid out in lanes: trace viewers want spans of one track to nest, and requests overlap as they like."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..profile import Column


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A span begins or ends."""

    at: int
    begins: bool
    row: int
    """Number of the span in the columns."""


def nesting(starts: Column, ends: Column) -> list[list[int]]:
    """Rows in as few lanes as greed finds, so that those of a lane nest or are disjoint; each lane in order of
    beginning, outer spans first. Spans of one thread fill one lane, unless clocks that disagree made them cross."""
    lanes: list[list[int]] = []
    open_ends: list[list[int]] = []
    ends = np.maximum(starts, ends)  # a damaged record, or clocks mapped onto each other: never before its begin
    first, last = starts.tolist(), ends.tolist()
    for row in np.lexsort((-ends, starts)).tolist():
        number = _first_that_holds(open_ends, first[row], last[row])
        if number == len(lanes):
            lanes.append([])
            open_ends.append([])
        lanes[number].append(row)
        open_ends[number].append(last[row])
    return lanes


def _first_that_holds(open_ends: list[list[int]], start: int, end: int) -> int:
    """The first lane whose open spans (by their ends, the innermost last) all hold this one; else the next new one."""
    for number, stack in enumerate(open_ends):
        while stack and stack[-1] <= start:
            stack.pop()
        if not stack or end <= stack[-1]:
            return number
    return len(open_ends)


def disjoint(starts: Column, ends: Column) -> list[list[int]]:
    """Rows in the fewest lanes in which no two overlap, each lane in order of beginning."""
    lanes: list[list[int]] = []
    free: list[tuple[int, int]] = []
    ends = np.maximum(starts, ends)
    first, last = starts.tolist(), ends.tolist()
    for row in np.lexsort((ends, starts)).tolist():
        if free and free[0][0] <= first[row]:
            _, lane = heapq.heappop(free)
        else:
            lane = len(lanes)
            lanes.append([])
        lanes[lane].append(row)
        heapq.heappush(free, (last[row], lane))
    return lanes


def edges(lane: list[int], starts: Column, ends: Column) -> Iterator[Edge]:
    """The begins and ends of one lane in order of time: what begins last ends first, and ends come before begins of the
    same instant."""
    ends = np.maximum(starts, ends)
    stack: list[int] = []
    for row in lane:
        start = int(starts[row])
        while stack and ends[stack[-1]] <= start:
            ended = stack.pop()
            yield Edge(at=int(ends[ended]), begins=False, row=ended)
        stack.append(row)
        yield Edge(at=start, begins=True, row=row)
    while stack:
        ended = stack.pop()
        yield Edge(at=int(ends[ended]), begins=False, row=ended)
