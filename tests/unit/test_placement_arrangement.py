"""Where blocks are, as far as it matters: going from one processor to the other takes time."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.scheduler.placement.arrangement import by_layers, counts_of, spread, together
from penstock.scheduler.placement.place import place
from penstock.scheduler.placement.problem import MODES, BlockClass, Mode, Problem, Rates, Rings, Use

RINGS = Rings(front_slots=2, front_slot_nbytes=1, back_slots=1, back_slot_nbytes=1)


def like(blocks: tuple[int, ...], *, cpu_s: float = 1.0, times: float = 1.0) -> BlockClass:
    """Of one byte each, that take a second on the device."""
    use = Use(device_s=times, cpu_s=times * cpu_s, on_cpu=True, times=times)
    return BlockClass(
        blocks=blocks, front_nbytes=1, host_nbytes=1, read_nbytes=1, copied_nbytes=1, uses=(use,)
    )  # fmt: skip


def problem(*classes: BlockClass, layers: dict[int, int], hand_over_s: float, device: int = 100) -> Problem:
    return Problem(
        classes=classes,
        device_nbytes=device + RINGS.front_nbytes,
        host_nbytes=100,
        rates=Rates(disk=0.1, link=0.1, overhead_s=0.0),
        layers=layers,
        hand_over_s=hand_over_s,
    )


LAYERS = {block: block // 2 for block in range(8)}
"""Four layers of two blocks."""


def modes_of(text: str) -> dict[int, Mode]:
    """By block: d is on the device, c computed by the CPU, r read."""
    names: dict[str, Mode] = {"d": "device", "c": "cpu", "r": "disk"}
    return {block: names[letter] for block, letter in enumerate(text)}


def test_a_layer_goes_to_the_cpu_once_and_what_is_left_of_one_goes_block_by_block() -> None:
    even, odd = like((0, 2, 4, 6)), like((1, 3, 5, 7), times=3.0)
    given_ = problem(even, odd, layers=LAYERS, hand_over_s=0.5)
    assert given_.hand_overs(modes_of("dddddddd"), 0) == 0
    assert given_.hand_overs(modes_of("ccdddddd"), 0) == 3  # it runs as often as what is used most in it
    assert given_.hand_overs(modes_of("cdrcdddd"), 0) == 1 + 3
    without = replace(given_, layers={})
    assert without.hand_overs(modes_of("ccdddddd"), 0) == 1 + 3


def test_what_hands_over_is_part_of_what_a_placement_takes() -> None:
    given_ = problem(like(tuple(range(8))), layers=LAYERS, hand_over_s=0.5)
    modes = modes_of("ccddcdcc")
    counts = counts_of(given_.classes, modes)
    assert given_.seconds(counts, modes) == given_.seconds(counts) + 0.5 * (1 + 1 + 1)


def test_the_cpu_is_slowed_by_copies_only_where_there_are_any() -> None:
    given_ = replace(problem(like(tuple(range(8)), cpu_s=4.0), layers=LAYERS, hand_over_s=0.0), copying=0.5)
    none, some = (counts_of(given_.classes, modes_of(text)) for text in ("cccccccd", "cccccccr"))
    assert given_.by_resource(none, 0)["processors"] == 7 * 4.0 + 1
    assert given_.by_resource(some, 0)["processors"] == 7 * 8.0 + 1


def test_together_the_device_has_the_start_of_every_class() -> None:
    classes = [like((0, 2, 4, 6)), like((1, 3, 5, 7))]
    counts = ((2, 0, 2, 0), (1, 0, 1, 2))
    modes = together(classes, counts)
    assert [modes[block] for block in (0, 2, 4, 6)] == ["device", "device", "cpu", "cpu"]
    assert modes[1] == "device"
    assert counts_of(classes, modes) == counts == counts_of(classes, spread(classes, counts))


def test_whole_layers_are_on_one_processor_and_what_no_ring_takes_stays() -> None:
    given_ = problem(like((0, 2, 4, 6)), like((1, 3, 5, 7)), layers=LAYERS, hand_over_s=1.0, device=5)
    assert by_layers(given_, RINGS, on_device=True) == modes_of("ddddcccc")
    assert by_layers(given_, RINGS, on_device=False) == modes_of("cccccccc")
    short = replace(given_, host_nbytes=RINGS.back_nbytes + 5)
    assert by_layers(short, RINGS, on_device=False) == modes_of("ccccrrrr")
    large = replace(given_.classes[0], front_nbytes=2)  # larger than a slot of the ring
    fixed = replace(given_, classes=(large, given_.classes[1]), device_nbytes=RINGS.front_nbytes + 9)
    assert by_layers(fixed, RINGS, on_device=False) == modes_of("dcdcdcdc")


def test_where_going_to_and_fro_costs_more_than_it_saves_one_processor_computes() -> None:
    """The device is a tenth faster, and has room for half: spread, that would cost four hand-overs more."""
    classes = like((0, 2, 4, 6), cpu_s=1.1), like((1, 3, 5, 7), cpu_s=1.1)
    free = place(problem(*classes, layers=LAYERS, hand_over_s=0.0, device=4), [RINGS])
    assert free is not None
    assert sum(mode == "device" for mode in free.modes.values()) == 4
    dear = place(problem(*classes, layers=LAYERS, hand_over_s=0.3, device=4), [RINGS])
    assert dear is not None
    assert dear.modes == modes_of("ddddcccc")
    assert dear.seconds == (1 - 0.05) * (4 + 4 * 1.1) + 0.05 * (4 + 4 * 1.1) + 2 * 0.3


@settings(max_examples=80, deadline=None)
@given(
    cpu_s=st.floats(0.2, 3.0),
    hand_over_s=st.floats(0.01, 3.0),
    device=st.integers(0, 6),
    host=st.integers(0, 8),
    paired=st.booleans(),
)
@example(cpu_s=1.5, hand_over_s=3.0, device=0, host=6, paired=False)  # copies hide products, but not hand-overs
def test_no_worse_than_what_is_spread_and_within_one_layer_of_the_best_there_is(
    cpu_s: float, hand_over_s: float, device: int, host: int, paired: bool
) -> None:
    """Of all ways to place six blocks, tried one by one."""
    layers = {block: block // 2 if paired else block for block in range(6)}
    given_ = replace(
        problem(like(tuple(range(6)), cpu_s=cpu_s), layers=layers, hand_over_s=hand_over_s, device=device),
        host_nbytes=RINGS.back_nbytes + host,
    )
    best = spreading = float("inf")
    for chosen in itertools.product(MODES, repeat=6):
        modes = dict(enumerate(chosen))
        counts = counts_of(given_.classes, modes)
        if given_.fits(counts, RINGS):
            best = min(best, given_.seconds(counts, modes))
            spreading = min(spreading, given_.seconds(counts, spread(given_.classes, counts)))
    placed = place(given_, [RINGS])
    assert placed is not None
    assert placed.seconds <= spreading * (1 + 1e-5)
    assert placed.seconds <= best + hand_over_s + max(1.0, cpu_s) + 1e-9
