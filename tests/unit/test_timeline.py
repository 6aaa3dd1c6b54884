"""The timeline's ring: oldest out first, the loss counted."""

from collections.abc import Callable

import msgspec
import pytest

from penstock.scheduler.timeline import Record, Timeline


def record(block: int) -> Record:
    return Record(kind="read", block=block, start_ns=block, end_ns=block + 1)


def test_a_ring_counts_what_it_drops() -> None:
    timeline = Timeline(capacity=3)
    for block in range(5):
        timeline.add(record(block))
    assert [r.block for r in timeline.records()] == [2, 3, 4]
    assert timeline.dropped == 2
    kept = timeline.records()
    timeline.add(record(9))
    assert [r.block for r in kept] == [2, 3, 4]  # a copy


def test_records_survive_a_round_trip_and_cannot_be_changed() -> None:
    one = Record(kind="copy", block=3, start_ns=1, end_ns=5, nbytes=7, note="x")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Record) == one
    with pytest.raises(AttributeError):
        one.block = 4  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"type":"record","kind":"other","block":1,"start_ns":0,"end_ns":1}', type=Record)


def test_a_listener_may_leave_at_any_moment() -> None:
    class Leaving(Timeline):
        """Its listener is gone when it is looked at for the second time, as if another thread had taken it away."""

        looked = 0

        @property
        def listener(self) -> Callable[[Record], None] | None:  # type: ignore[override]
            self.looked += 1
            return heard.append if self.looked == 1 else None

        @listener.setter
        def listener(self, value: Callable[[Record], None] | None) -> None:
            pass

    heard: list[Record] = []
    timeline = Leaving()
    timeline.add(record(1))
    assert [r.block for r in heard] == [1]
