"""What a plan makes of a model, as far as time is concerned: what a simulation is given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .simulated import Moved


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """The slots of one tier."""

    permanent: Mapping[int, int]
    """Bytes of the slot of each block that stays."""
    slots: int
    slot_nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a plan makes of a model, as far as time is concerned."""

    moved: Mapping[int, Moved]
    """By block."""
    front: Ring
    back: Ring | None
    uses: Mapping[str, tuple[int, ...]]
    """Blocks that each module's forward leases, in order."""
    pieces: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Blocks that a module leases one after another, each with its part of the module's operations."""
    on_cpu: Mapping[int, int] = field(default_factory=dict)
    """By block that stays on the host: calls of fewer rows are computed there."""
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Modules that the CPU computes as a whole, with their blocks; empty: each that leases such blocks only, by
    itself."""
    spare_slots: int = 0
    """Slots of the device's ring that leases may hold for who comes back from the CPU."""

    def root_of(self, rows: float) -> int:
        """What a call of as many rows is known by: the least threshold that it stays below; 0 where the CPU computes
        nothing of it. Calls of few rows use fewer blocks of the device's, in an order of their own."""
        return min((each for each in self.on_cpu.values() if rows < each), default=0)

    def guess(self, root: int, part: Collection[int]) -> tuple[int, ...]:
        """The blocks that such a call uses on the device, as they are defined.

        Args:
            root: See `root_of`.
            part: The blocks that the CPU computes where it computes no others; empty for all that it can.
        """
        paths = dict.fromkeys((*self.uses, *self.pieces))
        used = (block for path in paths for held in (self.uses, self.pieces) for block in held.get(path, ()))
        here = (b for b in used if not root or self.on_cpu.get(b, 0) < root or (part and b not in part))
        return tuple(dict.fromkeys(here))

    def parts(self) -> Mapping[str, tuple[int, ...]]:
        """What the CPU computes as a whole."""
        if self.units:
            return self.units
        return {path: held for path, held in self.uses.items() if held and all(self.on_cpu.get(b, 0) for b in held)}
