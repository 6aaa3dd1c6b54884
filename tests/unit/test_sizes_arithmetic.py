"""Sizes without a model: optimizer states, extrapolation, the peak of a step, placement on tiers."""

from __future__ import annotations

import pytest

from penstock.memory.errors import UsageError
from penstock.scheduler.fitting import Alternative, Room, fitting
from penstock.scheduler.sizes import (
    Bytes,
    Sizes,
    Training,
    Workload,
    extrapolate,
    extrapolate_bytes,
    optimizer_nbytes,
    step_nbytes,
    training_peak,
)

GIB = 2**30


def test_adamw_keeps_m_and_v_and_a_master_of_narrow_weights() -> None:
    assert optimizer_nbytes(1000, 4) == 8000
    assert optimizer_nbytes(1000, 2) == 12000
    assert step_nbytes(1000, 4) == 8000
    assert step_nbytes(1000, 2) == 12000


@pytest.mark.parametrize("size", [lambda n: 7, lambda n: 12 * n + 3, lambda n: 2 * n * n + 5 * n + 1])
def test_constants_lines_and_squares_are_extrapolated_exactly(size) -> None:  # type: ignore[no-untyped-def]
    assert extrapolate((6, 10, 14), [size(n) for n in (6, 10, 14)], 4096) == size(4096)


def test_extrapolated_bytes_are_never_negative() -> None:
    found = [Bytes(kv=n, workspace=100 - n) for n in (10, 20, 30)]
    assert extrapolate_bytes((10, 20, 30), found, 1000) == Bytes(kv=1000, workspace=0)


def test_a_step_peaks_in_the_sweep_or_in_the_optimizer() -> None:
    sweep = Bytes(activations=50, workspace=10)
    assert training_peak(weights=5, optimizer=10, gradients=20, sweep=sweep, step=8) == Bytes(
        weights=5, optimizer=10, activations=50, workspace=10
    )
    assert training_peak(weights=5, optimizer=10, gradients=60, sweep=sweep, step=8) == Bytes(
        weights=5, optimizer=10, gradients=60, workspace=8
    )


@pytest.mark.parametrize("bad", [{"batch": 0}, {"context": 1}, {"context": -5}, {"rank": 0}])
def test_a_workload_without_meaning(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(bad))}"):
        Workload(**bad)


def sizes(peak: Bytes, train: Training | None = None, most: Bytes | None = None) -> Sizes:
    return Sizes(
        model="m", architecture="M", parameters=1, trainable=0, dtype="bfloat16",
        workload=Workload(context=8, train=train), most=most or peak, peak=peak, checkpointed=None, block_nbytes=GIB,
        modules=(),
    )  # fmt: skip


def rooms(**gib: int) -> list[Room]:
    return [Room(tier=tier, nbytes=n * GIB, source="test") for tier, n in gib.items()]  # type: ignore[arg-type]


def test_resident_where_the_first_tier_holds_everything() -> None:
    found = fitting(sizes(Bytes(weights=8 * GIB, kv=2 * GIB)), rooms(host=10, disk=1))
    assert (found.verdict, found.missing_nbytes, found.suggestion) == ("resident", 0, None)
    assert [share.held.total for share in found.shares] == [10 * GIB, 0]


def test_weights_are_streamed_from_the_checkpoint_which_costs_no_disk() -> None:
    found = fitting(sizes(Bytes(weights=30 * GIB, kv=2 * GIB)), rooms(host=10, disk=0))
    assert found.verdict == "streamed"
    host, disk = (share.held for share in found.shares)
    assert host == Bytes(weights=8 * GIB, kv=2 * GIB)  # of the weights: six that stay, and two slots for the others
    assert disk == Bytes(weights=24 * GIB)
    assert found.suggestion == "24.00 GiB more on the host would end all streaming"


def test_three_tiers_are_filled_in_order_and_everything_is_somewhere() -> None:
    peak = Bytes(weights=20 * GIB, gradients=20 * GIB, optimizer=40 * GIB, activations=3 * GIB)
    found = fitting(sizes(peak, "adamw"), rooms(device=10, host=30, disk=100))
    device, host, disk = (share.held for share in found.shares)
    assert device == Bytes(weights=2 * GIB, gradients=5 * GIB, activations=3 * GIB)
    assert host == Bytes(weights=15 * GIB, gradients=15 * GIB)
    assert disk == Bytes(weights=5 * GIB, optimizer=40 * GIB)
    assert found.verdict == "streamed"
    # Trained weights are written: they take room on the disk as well.
    assert fitting(sizes(peak, "adamw"), rooms(device=10, host=30, disk=44)).verdict == "too large"


def test_what_cannot_move_must_fit_beside_two_blocks() -> None:
    found = fitting(sizes(Bytes(weights=30 * GIB, kv=9 * GIB)), rooms(host=10, disk=100))
    assert (found.verdict, found.needed_nbytes, found.missing_nbytes) == ("too large", 11 * GIB, 1 * GIB)
    assert found.suggestion == "lower --batch or --context, or have host=11.00 GiB"


def test_gradients_find_a_place_though_there_are_none_at_the_peak() -> None:
    peak = Bytes(weights=4 * GIB, optimizer=8 * GIB, activations=7 * GIB)
    most = Bytes(weights=4 * GIB, optimizer=8 * GIB, activations=7 * GIB, gradients=4 * GIB)
    found = fitting(sizes(peak, "adamw", most), rooms(host=10, disk=14))
    assert (found.verdict, found.missing_nbytes) == ("too large", 1 * GIB)
    assert found.suggestion == "lower --batch or --context, or have disk=15.00 GiB"
    assert fitting(sizes(peak, "adamw", most), rooms(host=10, disk=15)).verdict == "streamed"


def test_the_first_change_that_helps_is_suggested_and_no_more_are_tried() -> None:
    tried = []

    def alternatives():  # type: ignore[no-untyped-def]
        for change, kv in (("half", 5), ("quarter", 1), ("none", 0)):
            tried.append(change)
            peak = Bytes(weights=6 * GIB, kv=kv * GIB)
            yield Alternative(change=change, sizes=sizes(peak))

    found = fitting(sizes(Bytes(weights=6 * GIB, kv=9 * GIB)), rooms(host=10, disk=9), alternatives())
    assert found.suggestion == "quarter would take 7.00 GiB at its peak: everything would fit"
    assert tried == ["half", "quarter"]
