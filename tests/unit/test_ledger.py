"""The ledger of reservations."""

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.memory.errors import DoesNotFitError
from penstock.memory.ledger import Ledger, LedgerEntry, process_ledger

GIB = 2**30


def in_child(check: Callable[[], None]) -> int:
    """Exit status of a forked child that runs `check`."""
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_reservations_add_up_per_tier_and_owner() -> None:
    ledger = Ledger()
    first = ledger.reserve("a", "host", 3)
    ledger.reserve("a", "host", 4)
    ledger.reserve("b", "host", 5)
    ledger.reserve("b", "disk", 7)
    assert (ledger.reserved("host"), ledger.reserved("disk"), ledger.reserved("device")) == (12, 7, 0)
    assert ledger.statistics().entries == (
        LedgerEntry(owner="b", tier="disk", nbytes=7),
        LedgerEntry(owner="a", tier="host", nbytes=7),
        LedgerEntry(owner="b", tier="host", nbytes=5),
    )
    first.release()
    first.release()
    assert ledger.reserved("host") == ledger.statistics().reserved("host") == 9


def test_a_with_block_releases_also_on_an_exception() -> None:
    ledger = Ledger()

    def use() -> None:
        with ledger.reserve("a", "host", 3):
            assert ledger.reserved("host") == 3
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert ledger.reserved("host") == 0


def test_beyond_the_limit_the_others_are_named_and_nothing_is_booked() -> None:
    ledger = Ledger()
    ledger.reserve("llama", "host", 6 * GIB)
    ledger.reserve("whisper", "host", 1 * GIB)
    ledger.reserve("draft", "host", GIB // 2)
    ledger.reserve("llama", "disk", 99 * GIB)
    with pytest.raises(DoesNotFitError) as caught:
        ledger.reserve("draft", "host", 3 * GIB, limit_nbytes=8 * GIB)
    message = str(caught.value)
    assert message.startswith("draft needs 3.00 GiB of host memory; 0.50 GiB of 8.00 GiB is free")
    assert "llama holds 6.00 GiB, whisper holds 1.00 GiB" in message
    assert "already holds 0.50 GiB" in message
    assert "penstock.close" in message
    assert (caught.value.tier, caught.value.needed_nbytes, caught.value.available_nbytes) == (
        "host", 3 * GIB + GIB // 2, 1 * GIB,
    )  # fmt: skip
    assert ledger.reserved("host") == 7 * GIB + GIB // 2


def test_exactly_the_limit_fits() -> None:
    ledger = Ledger()
    ledger.reserve("a", "host", 5, limit_nbytes=8)
    ledger.reserve("b", "host", 3, limit_nbytes=8)
    with pytest.raises(DoesNotFitError):
        ledger.reserve("b", "host", 1, limit_nbytes=8)


def test_threads_never_book_more_than_the_limit() -> None:
    ledger = Ledger()

    def book(index: int) -> int:
        booked = 0
        for _ in range(200):
            try:
                ledger.reserve(f"model-{index}", "host", 1, limit_nbytes=500)
            except DoesNotFitError:
                continue
            booked += 1
        return booked

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(book, range(8))) == ledger.reserved("host") == 500


def test_a_forked_child_starts_empty_even_if_the_lock_was_held() -> None:
    ledger = Ledger()
    mine = ledger.reserve("parent", "host", 5)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._lock:
            entered.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()

    def check() -> None:
        assert ledger.reserved("host") == 0
        mine.release()
        ledger.reserve("child", "host", 2)
        assert ledger.reserved("host") == 2

    status = in_child(check)
    leave.set()
    holder.join()
    assert status == 0
    assert ledger.reserved("host") == 5


def test_one_ledger_per_process() -> None:
    assert process_ledger() is process_ledger()


def test_what_is_reserved_and_not_touched_is_still_to_come() -> None:
    ledger = Ledger()
    first = ledger.reserve("a", "host", 10)
    second = ledger.reserve("b", "host", 6)
    assert ledger.untouched("host") == 0, "memory that is taken at once counts as taken"
    first.touched = lambda: 4
    second.touched = lambda: 9  # more than it booked: rounding
    assert ledger.untouched("host") == 6
    assert ledger.untouched("device") == 0
    first.release()
    assert ledger.untouched("host") == 0


def test_a_reservation_may_be_filled_later_and_given_back_in_part() -> None:
    ledger = Ledger()
    mine = ledger.reserve("a", "host", 10, touched=lambda: 3)
    assert ledger.untouched("host") == 7
    mine.give_back(6)
    assert (ledger.reserved("host"), ledger.untouched("host")) == (4, 1)
    at_once = ledger.reserve("b", "host", 5)
    at_once.give_back(1)
    assert (ledger.reserved("host"), ledger.untouched("host")) == (8, 1)
