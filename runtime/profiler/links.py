"""What moved on each link, how fast, and how much of it hid behind computing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .intervals import Intervals, Ints
from .profile import Columns, Profile
from .schema import Link, Transfer
from .summary import LinkUse
from .window import Window


def moved(transfers: Columns, window: Window) -> npt.NDArray[np.float64]:
    """Bytes of each transfer that crossed inside the window; none of one that failed.

    A transfer that is partly outside is taken to go at an even pace, so that the bytes belong to the time they are
    divided by.
    """
    shares = window.share(transfers.start, transfers.end)
    return np.where(transfers.failed > 0, 0.0, np.maximum(transfers.nbytes, 0) * shares)


def link_uses(profile: Profile, window: Window, busy: Intervals) -> tuple[LinkUse, ...]:
    """The links that moved anything. `busy` is when something computed."""
    every = profile[Transfer]
    every = every.where(window.share(every.start, every.end) > 0)
    found = []
    for link in Link:
        transfers = every.where(every.link == link)
        if len(transfers):
            found.append(_use(profile, link, transfers, window, busy))
    return tuple(found)


def _use(profile: Profile, link: Link, transfers: Columns, window: Window, busy: Intervals) -> LinkUse:
    active = Intervals.union(transfers.start, transfers.end).clip(window.start, window.end)
    active_ns = active.length
    hidden_ns = active.shared(busy)
    nbytes = round(float(moved(transfers, window).sum()))
    bandwidth = nbytes / active_ns * 1e9 if active_ns else None
    peak = peak_of(profile, link)
    distinct = _distinct_nbytes(profile, transfers)
    return LinkUse(
        link=link.name,
        transfers=len(transfers),
        nbytes=nbytes,
        busy_ns=active_ns,
        overlap=hidden_ns / active_ns if active_ns else None,
        exposed_ns=active_ns - hidden_ns,
        bandwidth=bandwidth,
        peak=peak,
        efficiency=bandwidth / peak if bandwidth is not None and peak is not None else None,
        amplification=nbytes / distinct if distinct else None,
    )


def peak_of(profile: Profile, link: Link) -> float | None:
    """Measured bytes per second of a link; None where it was not measured."""
    peak = profile.header.peaks.get(link.name, 0.0)
    return peak if peak > 0 else None


def _distinct_nbytes(profile: Profile, transfers: Columns) -> int:
    """Bytes of the blocks that these transfers are of; a block that no table knows is as large as its largest one."""
    blocks, row = np.unique(transfers.block, return_inverse=True)
    largest: Ints = np.zeros(len(blocks), dtype=np.int64)
    np.maximum.at(largest, row, transfers.nbytes)
    known = profile.blocks
    return sum(
        known[block].nbytes if block in known else size
        for block, size in zip(blocks.tolist(), largest.tolist(), strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time that a window could take."""

    ns: float | None
    """None where nothing is known that takes time."""
    binds: str
    """compute, or the name of a link; "" where there is no bound."""

    @staticmethod
    def of(compute_ns: int, links: tuple[LinkUse, ...]) -> Bound:
        """Computing, or the bytes of a link at its measured rate: whichever takes longest.

        Every link counts by itself. Links that share hardware would share one term, but nothing yet says which do.
        """
        terms = {"compute": float(compute_ns)}
        terms |= {use.link: use.nbytes / use.peak * 1e9 for use in links if use.peak is not None}
        binds = max(terms, key=lambda name: terms[name])
        return Bound(ns=terms[binds], binds=binds) if terms[binds] > 0 else Bound(ns=None, binds="")
