"""The ring of records: order, drop-oldest, and counts that are exact under threads."""

import threading

import pytest

from penstock.memory.errors import UsageError
from penstock.runtime.profiler.ring import RECORD_NBYTES, Ring
from penstock.runtime.profiler.schema import Gauge, Meter, Record

THREADS, EACH = 4, 20_000


def gauge(value: int) -> Gauge:
    return Gauge(at=value, meter=Meter.HOST_RSS, value=value)


def values(records: list[Record]) -> list[int]:
    return [record.value for record in records if isinstance(record, Gauge)]


def test_records_leave_in_the_order_in_which_they_came() -> None:
    ring = Ring(10 * RECORD_NBYTES)
    for value in range(7):
        ring.append(gauge(value))
    assert ring.waiting == 7
    assert values(ring.drain()) == list(range(7))
    assert ring.drain() == []


def test_the_oldest_records_are_dropped() -> None:
    ring = Ring(4 * RECORD_NBYTES)
    for value in range(10):
        ring.append(gauge(value))
    now = ring.statistics()
    assert (now.recorded, now.dropped, now.drained, now.waiting, now.capacity) == (10, 6, 0, 4, 4)
    assert values(ring.drain()) == [6, 7, 8, 9]
    assert ring.statistics() == ring.statistics()  # looking changes nothing
    assert (ring.statistics().recorded, ring.statistics().dropped, ring.statistics().drained) == (10, 6, 4)


@pytest.mark.parametrize("nbytes", [-1, 0, RECORD_NBYTES - 1])
def test_a_ring_without_room_is_refused(nbytes: int) -> None:
    with pytest.raises(UsageError, match="holds no record"):
        Ring(nbytes)


@pytest.mark.parametrize("capacity", [3, 1000, THREADS * EACH])
def test_counts_are_exact_under_threads(capacity: int) -> None:
    ring = Ring(capacity * RECORD_NBYTES)
    taken: list[int] = []
    seen: list[int] = []

    def fill(first: int) -> None:
        for value in range(first, first + EACH):
            ring.append(gauge(value))

    threads = [threading.Thread(target=fill, args=(i * EACH,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += values(ring.drain())
        seen.append(ring.statistics().recorded)
    for thread in threads:
        thread.join()
    taken += values(ring.drain())
    found = ring.statistics()
    assert found.recorded == THREADS * EACH
    assert found.dropped == THREADS * EACH - len(taken)
    assert (found.drained, found.waiting) == (len(taken), 0)
    assert len(set(taken)) == len(taken)
    assert seen == sorted(seen)
    for i in range(THREADS):  # each thread's records stay in order
        own = [value for value in taken if value // EACH == i]
        assert own == sorted(own)
