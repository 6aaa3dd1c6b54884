"""The ledger: what each model of this process has reserved of each tier."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from .errors import DoesNotFitError


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """What one owner holds of one tier, all its reservations together."""

    owner: str
    tier: str
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerStatistics:
    """A picture of the ledger at one instant."""

    entries: tuple[LedgerEntry, ...]
    """Sorted by tier, then owner. Nobody who holds nothing is listed."""

    def reserved(self, tier: str) -> int:
        """Bytes reserved of `tier` by everybody."""
        return sum(entry.nbytes for entry in self.entries if entry.tier == tier)


class Reservation:
    """A share of a tier, held until `release()` or the end of the `with` block."""

    def __init__(
        self, ledger: Ledger, owner: str, tier: str, nbytes: int, touched: Callable[[], int] | None = None
    ) -> None:
        self._ledger = ledger
        self.owner = owner
        self.tier = tier
        self.nbytes = nbytes
        self.touched: Callable[[], int] = touched or (lambda: self.nbytes)
        """Bytes of it that the system has provided already, and so no longer counts as available."""

    def give_back(self, nbytes: int) -> None:
        """Give a part of the bytes back, and keep the rest."""
        assert 0 <= nbytes <= self.nbytes, (nbytes, self)
        with self._ledger._lock:
            self.nbytes -= nbytes

    def release(self) -> None:
        """Give the bytes back. More than once does no harm; in a forked child it does nothing."""
        self._ledger._remove(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Reservation(owner={self.owner!r}, tier={self.tier!r}, nbytes={self.nbytes})"


class Ledger:
    """Counts reservations. Thread-safe. A forked child starts empty: the arenas of its parent are not in it."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=functools.partial(_forget_in_child, weakref.ref(self)))

    def reserve(
        self,
        owner: str,
        tier: str,
        nbytes: int,
        *,
        limit_nbytes: int | None = None,
        touched: Callable[[], int] | None = None,
    ) -> Reservation:
        """Book `nbytes` of `tier` for `owner`, a name that a user recognises in an error message.

        `limit_nbytes` is what the tier can give to all models of this process together. `touched` tells how much of the
        reservation the system has provided so far; all of it where it is left out.

        Raises:
            DoesNotFitError: with this reservation the tier would hold more than `limit_nbytes`. Nothing is booked.
        """
        assert nbytes >= 0, nbytes
        reservation = Reservation(self, owner, tier, nbytes, touched)
        with self._lock:
            held = self._held(tier)
            if limit_nbytes is not None and held.total() + nbytes > limit_nbytes:
                raise _does_not_fit(reservation, held, limit_nbytes)
            self._reservations.add(reservation)
        return reservation

    def reserved(self, tier: str) -> int:
        """Bytes reserved of `tier` by everybody."""
        with self._lock:
            return self._held(tier).total()

    def untouched(self, tier: str) -> int:
        """Bytes of `tier` that are reserved, and that the system still counts as available."""
        with self._lock:
            items = [item for item in self._reservations if item.tier == tier]
        return sum(max(0, item.nbytes - item.touched()) for item in items)

    def statistics(self) -> LedgerStatistics:
        """Who holds what now."""
        held: Counter[tuple[str, str]] = Counter()
        with self._lock:
            for item in list(self._reservations):
                held[item.tier, item.owner] += item.nbytes
        return LedgerStatistics(
            entries=tuple(
                LedgerEntry(owner=owner, tier=tier, nbytes=nbytes)
                for (tier, owner), nbytes in sorted(held.items())
                if nbytes
            )
        )

    def _held(self, tier: str) -> Counter[str]:
        held: Counter[str] = Counter()
        # A copy: a finalizer may release a reservation in the middle of the loop.
        for item in list(self._reservations):
            if item.tier == tier:
                held[item.owner] += item.nbytes
        return held

    def _remove(self, reservation: Reservation) -> None:
        with self._lock:
            self._reservations.discard(reservation)

    def _forget(self) -> None:
        # The lock too: at the fork another thread of the parent may have held it.
        # Reentrant, because a finalizer that releases may run while this thread is inside.
        self._lock = threading.RLock()
        self._reservations: set[Reservation] = set()


@functools.cache
def process_ledger() -> Ledger:
    """The ledger that all models of this process share."""
    return Ledger()


def _forget_in_child(ledger: weakref.ref[Ledger]) -> None:
    alive = ledger()
    if alive is not None:
        alive._forget()


def _does_not_fit(wanted: Reservation, held: Counter[str], limit_nbytes: int) -> DoesNotFitError:
    own = held[wanted.owner]
    others = sorted((owner, nbytes) for owner, nbytes in held.items() if owner != wanted.owner and nbytes)
    free = max(0, limit_nbytes - held.total())
    message = (
        f"{wanted.owner} needs {_gib(wanted.nbytes)} of {wanted.tier} memory; "
        f"{_gib(free)} of {_gib(limit_nbytes)} is free"
    )
    if own:
        message += f" ({wanted.owner} itself already holds {_gib(own)})"
    if others:
        message += f": {', '.join(f'{owner} holds {_gib(nbytes)}' for owner, nbytes in others)}"
        message += f". Close one of them with penstock.close(model), or give them a smaller {wanted.tier} budget."
    else:
        message += f". Give {wanted.owner} a smaller {wanted.tier} budget."
    return DoesNotFitError(
        message,
        tier=wanted.tier,
        needed_nbytes=own + wanted.nbytes,
        available_nbytes=max(0, limit_nbytes - (held.total() - own)),
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
