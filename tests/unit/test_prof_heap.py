"""What glibc's heap keeps: never told too high, and told where a peak may be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.runtime.profiler import heap
from penstock.runtime.profiler.heap import ALLOWANCE_NS, SHARE, Heap, HostMemory
from penstock.runtime.profiler.pages import anonymous_nbytes, resident_nbytes

MIB = 2**20
CHUNK = 100 * 1024
"""Below the size from which malloc maps blocks on their own."""


class Told(Heap):
    """A heap that says what it is told to, and counts looks."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int]] = []
        self.looks = 0

    def look(self) -> tuple[int, int]:
        self.looks += 1
        if not self.answers:
            raise OSError("the heap has shrunk")
        return self.answers.pop(0)


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel will say is resident."""
    found: list[int] = []
    monkeypatch.setattr(heap, "resident_nbytes", lambda: found.pop(0))
    return found


def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library


def alone(work: Callable[[Heap], None]) -> None:
    """Do it in a process of its own: memory that other tests have in use and nobody has touched makes what is told too
    low by an amount that nobody knows."""
    if Heap.find() is None:
        pytest.skip("no glibc that tells about its heap")
    code = f"import test_prof_heap as t; t.{work.__name__}(t.Heap.find())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_chunks_that_were_touched_and_freed_are_told() -> None:
    alone(free_touched_chunks)


def free_touched_chunks(real: Heap) -> None:
    library = libc()
    chunks = [library.malloc(CHUNK) for _ in range(600)]
    for chunk in chunks:
        ctypes.memset(chunk, 1, CHUNK)
    library.malloc(CHUNK)  # what is on top of a heap is given back at once
    resident, before = real.look()
    for chunk in chunks:
        library.free(chunk)
    after_resident, after = real.look()
    assert abs(after_resident - resident) < 8 * MIB
    assert 50 * MIB < after - before < 60 * MIB


def test_chunks_in_use_are_not_told_and_nor_are_those_never_touched() -> None:
    alone(use_chunks)


def use_chunks(real: Heap) -> None:
    library = libc()
    library.malloc_trim(0)
    _, before = real.look()
    chunks = [library.malloc(CHUNK) for _ in range(600)]
    for chunk in chunks[:300]:
        ctypes.memset(chunk, 1, CHUNK)
    _, after = real.look()
    assert after <= before + MIB


def test_anonymous_pages_are_part_of_the_resident_ones() -> None:
    assert 0 < anonymous_nbytes() < resident_nbytes()


def test_it_is_looked_at_where_a_peak_may_be(readings: list[int]) -> None:
    told, clock = Told(), Clock()
    memory = HostMemory(told, clock=clock, spent=Clock())
    told.answers = [(1000, 5), (1010, 7), (1001, 6)]
    seen = []
    for reading in (1000, 500, 1010, 1001, 900):
        readings[:] = [reading]
        seen.append((memory.resident(), memory.freed()))
    assert seen == [(1000, 5), (500, None), (1010, 7), (1001, 6), (900, None)]


def test_looks_take_a_small_share_of_the_time(readings: list[int]) -> None:
    told, clock, spent = Told(), Clock(), Clock()
    memory = HostMemory(told, clock=clock, spent=spent)
    looked = []
    for number in range(4):
        clock.now = number
        spent.now = number
        told.answers, readings[:] = [(1000 + 10 * number, 0)], [1000 + 10 * number]
        look = told.look

        def slow(look: object = look) -> tuple[int, int]:
            spent.now += ALLOWANCE_NS
            return Told.look(told)

        told.look = slow  # type: ignore[method-assign]
        before = told.looks
        memory.resident()
        looked.append(told.looks - before)
    assert looked == [1, 1, 0, 0]
    clock.now += 3 * ALLOWANCE_NS * SHARE["light"]
    readings[:] = [2000]
    memory.resident()
    assert told.looks == 3


def test_where_more_is_known_than_ever_it_is_looked_at_first(readings: list[int]) -> None:
    told, spent = Told(), Clock()
    known = [0]
    memory = HostMemory(told, known=lambda: known[0], clock=Clock(), spent=spent)
    told.answers, readings[:] = [(1000, 5)], [1000]
    memory.resident()
    memory._spent = ALLOWANCE_NS  # other looks may not take more than half of it
    looked = []
    for now, reading in ((0, 1001), (700, 980), (702, 1004), (720, 979), (720, 990), (730, 990)):
        known[0], told.answers, readings[:] = now, [(reading, 7)], [reading]
        memory.resident()
        looked.append(memory.freed() is not None)
    assert looked == [False, True, False, False, True, True]


def test_a_heap_that_shrinks_meanwhile_is_not_told(readings: list[int]) -> None:
    memory = HostMemory(Told(), clock=Clock(), spent=Clock())
    readings[:] = [1000, 700]
    assert (memory.resident(), memory.freed()) == (1000, None)
    assert memory.in_use() == 700


def test_without_such_a_heap_everything_resident_is_in_use(readings: list[int]) -> None:
    memory = HostMemory(None)
    readings[:] = [1000, 700]
    assert (memory.resident(), memory.freed(), memory.in_use()) == (1000, None, 700)


def test_what_is_free_is_not_in_use() -> None:
    told = Told()
    told.answers = [(1000, 300)]
    assert HostMemory(told).in_use() == 700
