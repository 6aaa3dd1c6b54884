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
    """One per tier; the first is the one that computes. It holds more than it has room for where it is too small."""
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
    sizes: Sizes


def fitting(sizes: Sizes, rooms: Sequence[Room], alternatives: Iterable[Alternative] = ()) -> Fitting:
    """Place what `sizes` says on `rooms`, of which the first computes and the last is the disk.

    `alternatives` are tried in their order where not everything is resident, and only as many as it takes: the first
    that would make it so, or else the first that would make it fit at all, is suggested.
    """
    placed = _place(sizes, rooms)
    if placed.verdict == "resident":
        return placed
    return replace(placed, suggestion=_suggestion(placed, rooms, alternatives))


def _place(sizes: Sizes, rooms: Sequence[Room]) -> Fitting:
    first, peak = rooms[0], sizes.peak
    if peak.total <= first.nbytes:
        shares = [_share(room, peak if room is first else Bytes()) for room in rooms]
        return Fitting(
            verdict="resident", shares=tuple(shares), needed_nbytes=peak.total, missing_nbytes=0, suggestion=None
        )
    ring = SLOTS * sizes.block_nbytes
    fixed = Bytes(weights=ring, activations=peak.activations, kv=peak.kv, workspace=peak.workspace)
    # At the peak there may be no gradients yet: they want a place all the same.
    left = {kind: getattr(sizes.most, kind) for kind in _MOVABLE}
    shares = []
    for room in rooms:
        held = fixed if room is first else Bytes()
        free = max(room.nbytes - held.total, 0)
        for kind in _MOVABLE:
            # Weights on disk are the checkpoint itself, unless training changes them.
            costs = not (room.tier == "disk" and kind == "weights" and sizes.workload.train != "adamw")
            taken = min(left[kind], free) if costs else left[kind]
            left[kind] -= taken
            free -= taken if costs else 0
            held += Bytes(**{kind: taken})
        shares.append(_share(room, held))
    missing = max(fixed.total - first.nbytes, 0) + sum(left.values())
    return Fitting(
        verdict="too large" if missing else "streamed",
        shares=tuple(shares),
        needed_nbytes=fixed.total,
        missing_nbytes=missing,
        suggestion=None,
    )


def _share(room: Room, held: Bytes) -> Share:
    return Share(tier=room.tier, room_nbytes=room.nbytes, room_source=room.source, held=held)


def _suggestion(placed: Fitting, rooms: Sequence[Room], alternatives: Iterable[Alternative]) -> str:
    possible = None
    for each in alternatives:
        found, total = _place(each.sizes, rooms), _gib(each.sizes.peak.total)
        if found.verdict == "resident":
            return f"{each.change} would take {total} at its peak: everything would fit"
        if found.verdict == "streamed" and possible is None:
            possible = f"{each.change} would make it fit, streamed: {total} at its peak"
    first, last = rooms[0], rooms[-1]
    if placed.verdict == "streamed":
        missing = sum(share.held.total for share in placed.shares[1:])
        return f"{_gib(missing)} more on the {first.tier} would end all streaming"
    if possible is not None:
        return possible
    lacks = placed.needed_nbytes - first.nbytes
    wanted = [f"{first.tier}={_gib(placed.needed_nbytes)}"] if lacks > 0 else []
    if placed.missing_nbytes > max(lacks, 0):
        wanted.append(f"{last.tier}={_gib(last.nbytes + placed.missing_nbytes - max(lacks, 0))}")
    return f"lower --batch or --context, or have {' and '.join(wanted)}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
