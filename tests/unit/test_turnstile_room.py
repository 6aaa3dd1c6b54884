"""Members that hold blocks while they are away: what is kept for all of them fits the slots that there are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_turnstile_two import Call, Play, Step, cpu, device, on, ticks


def nested(first: int, how: list[bool], ticks: list[int]) -> Step:
    """A block that is held while two others are used, one of them by the CPU."""
    there = [(cpu if on_cpu else device)(first + 1 + place, ticks[place]) for place, on_cpu in enumerate(how)]
    return Step(how="device", block=first, ticks=0, inner=tuple(there))


def test_blocks_held_by_who_is_away_take_slots_that_others_must_leave() -> None:
    """Each of four is away inside of a block of its own; a ring of three slots has no room for all of them."""
    programs = [[Call((nested(4 * member, [True], [9]), device(4 * member + 3)))] for member in range(4)]
    play = Play(depth=2).run(programs)
    assert on(play, "cpu") == [(0, 0, 1), (10, 1, 5), (20, 2, 9), (30, 3, 13)]


@settings(max_examples=500)
@given(
    hows=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=4),
    skipped=st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=5),
    ahead=st.integers(0, 2),
    data=st.data(),
)
def test_nested_blocks_never_need_more_slots_than_there_are(
    hows: list[list[bool]], skipped: list[set[int]], ahead: int, data: st.DataObject
) -> None:
    """Members that skip some, on either processor, however long anything takes: the nesting, one more, and `ahead`."""

    def call(skips: set[int]) -> Call:
        steps = (
            nested(3 * place, how, [data.draw(ticks), data.draw(ticks)])
            for place, how in enumerate(hows)
            if place not in skips
        )
        return Call(tuple(steps))

    calls = [call(skips) for skips in skipped]
    play = Play(ahead=ahead, depth=2).run([[each, each] for each in calls])
    for member, each in enumerate(calls):
        assert len(play.used[member]) == 2 * 3 * len(each.steps)
