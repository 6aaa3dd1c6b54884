"""Where what a model takes would lie, tier by tier, and the one change that would help most if it is too much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from .plan import Home
from .sizes import Bytes, Kind, Sizes

SLOTS: Final = 2
"""Blocks that a ring must hold: one that computes, one that is on its way."""
_MOVABLE: Final[tuple[Kind, ...]] = ("gradients", "weights", "optimizer")
"""What can live below the tier that computes, in the order in which it gets the room there is: gradients are written
and read in every step, weights read, optimizer states wanted once per step."""

Verdict = Literal["resident", "streamed", "too large"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a tier can give."""

    tier: Home
    nbytes: int
    source: str
    """Where that figure is from, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What lies on one tier when most is held."""

    tier: Home
    room_nbytes: int
    room_source: str
    held: Bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """How a model fits a machine."""

    verdict: Verdict
    """resident: nothing moves. streamed: some of it comes from a tier below when it is used."""
    shares: tuple[Share, ...]
    """One per tier; the first is the one that computes. Where nothing fits, only what would be needed of it."""
    needed_nbytes: int
    """The least that the tier that computes must have."""
    missing_nbytes: int
    """What the tier that computes, or all tiers together, lack; 0 where it fits."""
    suggestion: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """The same work asked for in another way."""

    change: str
    """For example "--dtype bfloat16"."""
    peak: Bytes
    block_nbytes: int


def fitting(sizes: Sizes, rooms: Sequence[Room], alternatives: Iterable[Alternative] = ()) -> Fitting:
    """Place the peak of `sizes` on `rooms`, of which the first computes and the last is the disk.

    `alternatives` are tried in their order where not everything is resident, and only as many as it takes: the first
    that would make it so, or else the first that would make it fit at all, is suggested.
    """
    placed = _place(sizes.peak, sizes.block_nbytes, rooms)
    if placed.verdict == "resident":
        return placed
    return replace(placed, suggestion=_suggestion(placed, rooms, alternatives))


def _place(peak: Bytes, block_nbytes: int, rooms: Sequence[Room]) -> Fitting:
    first = rooms[0]
    fixed = Bytes(activations=peak.activations, kv=peak.kv, workspace=peak.workspace)
    if peak.total <= first.nbytes:
        shares = [_share(room, peak if room is first else Bytes()) for room in rooms]
        return Fitting(
            verdict="resident", shares=tuple(shares), needed_nbytes=peak.total, missing_nbytes=0, suggestion=None
        )
    ring = SLOTS * block_nbytes
    needed = fixed.total + ring
    if needed > first.nbytes:
        held = fixed + Bytes(weights=ring)
        shares = [_share(room, held if room is first else Bytes()) for room in rooms]
        return Fitting(
            verdict="too large",
            shares=tuple(shares),
            needed_nbytes=needed,
            missing_nbytes=needed - first.nbytes,
            suggestion=None,
        )
    left = {kind: getattr(peak, kind) for kind in _MOVABLE}
    shares = []
    for room in rooms:
        free = room.nbytes - (needed if room is first else 0)
        taken: dict[str, int] = {}
        for kind in _MOVABLE:
            # Weights on disk are the checkpoint itself, unless training changes them.
            costs = not (room.tier == "disk" and kind == "weights" and not peak.gradients)
            taken[kind] = min(left[kind], max(free, 0)) if costs else left[kind]
            left[kind] -= taken[kind]
            free -= taken[kind] if costs else 0
        held = Bytes(**taken)
        shares.append(_share(room, held + fixed + Bytes(weights=ring) if room is first else held))
    missing = sum(left.values())
    return Fitting(
        verdict="too large" if missing else "streamed",
        shares=tuple(shares),
        needed_nbytes=needed,
        missing_nbytes=missing,
        suggestion=None,
    )


def _share(room: Room, held: Bytes) -> Share:
    return Share(tier=room.tier, room_nbytes=room.nbytes, room_source=room.source, held=held)


def _suggestion(placed: Fitting, rooms: Sequence[Room], alternatives: Iterable[Alternative]) -> str:
    possible = None
    for each in alternatives:
        found = _place(each.peak, each.block_nbytes, rooms)
        if found.verdict == "resident":
            return f"{each.change} would take {each.peak.total / 2**30:.2f} GiB at its peak: everything would fit"
        if found.verdict == "streamed" and possible is None:
            possible = f"{each.change} would make it fit, streamed: {each.peak.total / 2**30:.2f} GiB at its peak"
    if placed.verdict == "too large" and possible is not None:
        return possible
    first = rooms[0]
    if placed.verdict == "streamed":
        missing = sum(share.held.total for share in placed.shares[1:])
        return f"{missing / 2**30:.2f} GiB more on the {first.tier} would end all streaming"
    if placed.needed_nbytes > first.nbytes:
        return f"a {first.tier} of {placed.needed_nbytes / 2**30:.2f} GiB would do"
    return f"{placed.missing_nbytes / 2**30:.2f} GiB more on the {rooms[-1].tier} would do"
