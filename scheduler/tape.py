"""What a run takes and gives back, in order, and the instant at which it holds most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .sizes import Bytes, Kind


@dataclass(kw_only=True, slots=True)
class Piece:
    """One allocation."""

    nbytes: int
    unit: str
    """The module that was at work when it was taken; "" for none."""
    kind: Kind = "workspace"
    """What it turned out to be for, which is known only later."""
    live: bool = True


@dataclass(kw_only=True, slots=True)
class Tape:
    """The allocations of one run."""

    pieces: list[Piece] = field(default_factory=list)
    """By number."""
    _events: list[int] = field(default_factory=list)
    """Numbers of pieces: n where piece n is taken, ~n where it is given back."""

    def take(self, nbytes: int, unit: str = "") -> int:
        """A piece of `nbytes` is allocated; its number."""
        number = len(self.pieces)
        self.pieces.append(Piece(nbytes=nbytes, unit=unit))
        self._events.append(number)
        return number

    def give(self, number: int) -> None:
        """Piece `number` is freed."""
        assert self.pieces[number].live, f"piece {number} freed twice"
        self.pieces[number].live = False
        self._events.append(~number)

    def mark(self, numbers: Iterable[int], kind: Kind) -> None:
        """Say what pieces are for, from when they were taken on."""
        for number in numbers:
            self.pieces[number].kind = kind

    def live(self) -> list[int]:
        """Numbers of the pieces that are held now."""
        return [number for number, piece in enumerate(self.pieces) if piece.live]

    def held(self, kind: Kind) -> dict[str, int]:
        """Bytes that are held now for one purpose, by unit."""
        found: dict[str, int] = defaultdict(int)
        for piece in self.pieces:
            if piece.live and piece.kind == kind:
                found[piece.unit] += piece.nbytes
        return dict(found)

    @property
    def position(self) -> int:
        """How much has happened until now."""
        return len(self._events)

    def peak_since(self, position: int) -> int:
        """Bytes that were held at most since then, beyond what was held then."""
        held = highest = 0
        for event in self._events[position:]:
            held += self._change(event)
            highest = max(highest, held)
        return highest

    def peak(self, *, before: Kind | None = None, without: Kind | None = None) -> Bytes:
        """What is held at the first of the instants at which most is held, of those before the first piece of a kind is
        taken; `without` leaves out what is for one purpose."""
        held = highest = 0
        at = -1
        for index, event in enumerate(self._events):
            kind = self.pieces[max(event, ~event)].kind
            if event >= 0 and kind == before:
                break
            if kind == without:
                continue
            held += self._change(event)
            if held > highest:
                highest, at = held, index
        totals: dict[Kind, int] = defaultdict(int)
        for event in self._events[: at + 1]:
            totals[self.pieces[max(event, ~event)].kind] += self._change(event)
        return Bytes(**{kind: nbytes for kind, nbytes in totals.items() if kind != without})

    def _change(self, event: int) -> int:
        return self.pieces[event].nbytes if event >= 0 else -self.pieces[~event].nbytes
