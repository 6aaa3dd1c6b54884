"""Arenas: exact to the byte, poisoned, stamped, and not there in a forked child."""

import ctypes
import os
import warnings

import pytest
import torch

from penstock.memory.arena import PAGE, POISON, AnyArena, ArenaStatistics, HostArena, debug_enabled, round_up
from penstock.memory.errors import ClosedError, ForkError


@pytest.mark.parametrize("asked", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 1_000_001])
def test_an_arena_is_exactly_as_large_as_the_pages_it_needs(asked: int) -> None:
    arena = HostArena(asked)
    assert arena.nbytes == max(PAGE, -(-asked // PAGE) * PAGE)
    assert len(arena.buffer) == arena.nbytes
    assert arena.address % PAGE == 0
    assert bytes(arena.view(0, 16)) == bytes(16)
    arena.close()


def test_slots_lie_front_to_back_without_gaps() -> None:
    arena = HostArena(4 * PAGE)
    assert arena.statistics() == ArenaStatistics(tier="host", nbytes=4 * PAGE, cut_nbytes=0, slots=0)
    slots = [arena.cut(1), arena.cut(PAGE), arena.cut(PAGE + 1)]
    assert [(slot.offset, slot.nbytes) for slot in slots] == [(0, PAGE), (PAGE, PAGE), (2 * PAGE, 2 * PAGE)]
    assert arena.statistics() == ArenaStatistics(tier="host", nbytes=4 * PAGE, cut_nbytes=4 * PAGE, slots=3)
    with pytest.raises(AssertionError, match="overran"):
        arena.cut(1)
    with pytest.raises(AttributeError):
        arena.statistics().slots = 0  # type: ignore[misc]
    arena.close()


def test_views_are_the_memory() -> None:
    arena = HostArena(2 * PAGE)
    arena.view(PAGE, 4)[:] = b"abcd"
    assert ctypes.string_at(arena.address + PAGE, 4) == b"abcd"
    arena.move(PAGE + 1, PAGE, 3)  # overlapping
    assert bytes(arena.view(PAGE, 4)) == b"aabc"
    assert bytes(arena.view(0, PAGE)) == bytes(PAGE)
    arena.close()


def test_poison_reads_as_nan_in_every_floating_dtype_and_stays_in_its_slot() -> None:
    arena = HostArena(3 * PAGE)
    slots = [arena.cut(PAGE) for _ in range(3)]
    arena.poison(slots[1])
    assert bytes(arena.view(PAGE, PAGE)) == bytes([POISON]) * PAGE
    assert bytes(arena.view(0, PAGE)) == bytes(arena.view(2 * PAGE, PAGE)) == bytes(PAGE)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
        found = torch.frombuffer(bytearray(arena.view(PAGE, 64)), dtype=dtype)
        assert found.to(torch.float32).isnan().all(), dtype
    arena.close()


def test_stamp_names_what_is_there_and_what_was_expected() -> None:
    arena = HostArena(PAGE)
    slot = arena.cut(PAGE)
    with pytest.raises(AssertionError, match="holds -1, not 3"):
        slot.check_stamp(3)
    slot.stamp = 3
    slot.check_stamp(3)
    with pytest.raises(AssertionError, match="host holds 3, not 4"):
        slot.check_stamp(4)
    arena.close()


def test_closed_arenas_lend_nothing() -> None:
    arena = HostArena(PAGE)
    arena.close()
    arena.close()
    with pytest.raises(ClosedError):
        arena.view(0, 1)


def test_a_tensor_that_outlives_the_arena_keeps_its_values() -> None:
    arena = HostArena(4 * PAGE)
    tensor = torch.frombuffer(arena.buffer, dtype=torch.uint8)
    tensor.fill_(7)
    arena.close()
    assert int(tensor.sum()) == 7 * 4 * PAGE


def test_a_forked_child_is_told_and_its_parent_keeps_the_memory() -> None:
    arena = HostArena(PAGE)
    arena.view(0, 1)[:] = b"x"
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside torch's threads; this child only exits
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 1
        try:
            arena.view(0, 1)
        except ForkError as error:
            status = 0 if "child" in str(error) else 2
        finally:
            arena.close()  # harmless
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(arena.view(0, 1)) == b"x"
    arena.close()


@pytest.mark.parametrize(("nbytes", "multiple", "expected"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 4096, 4096)])
def test_round_up(nbytes: int, multiple: int, expected: int) -> None:
    assert round_up(nbytes, multiple) == expected


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert debug_enabled()  # the suite runs with it
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("PENSTOCK_DEBUG", value)
        assert debug_enabled() is expected
    monkeypatch.delenv("PENSTOCK_DEBUG")
    assert not debug_enabled()


def test_an_arena_of_no_memory_cannot_be_poisoned() -> None:
    arena = AnyArena(tier="device", nbytes=PAGE)
    with pytest.raises(NotImplementedError):
        arena.poison(arena.cut(1))
    with pytest.raises(NotImplementedError):
        arena.close()


def test_resident_bytes_are_those_that_were_touched() -> None:
    arena = HostArena(64 * 2**20)
    assert arena.resident_nbytes() == 0
    arena.view(8 * 2**20, 1)[0] = 1
    touched = arena.resident_nbytes()
    assert PAGE <= touched <= 2 * 2**20  # a page, or a huge one
    ctypes.memset(arena.address, 1, arena.nbytes)
    assert arena.resident_nbytes() == arena.nbytes
    arena.close()
    assert arena.resident_nbytes() == 0
