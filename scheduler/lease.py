"""What a consumer holds while it uses a block, and what it holds while it waits for one."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from .residence import Residence


@dataclass(kw_only=True, slots=True, eq=False)
class Lease:
    """What a consumer holds while it uses a resident block."""

    residence: Residence
    waited_ns: int = 0

    @property
    def block(self) -> int:
        """Id of the leased block."""
        return self.residence.block


@dataclass(kw_only=True, slots=True, eq=False)
class Wish:
    """A consumer that waits for a block."""

    block: int
    since_ns: int
    host: bool = False
    """Whether it is the host's copy that is waited for, to compute with it there."""
    counted: bool = True
    """Whether it is a use: not where somebody only waits until a block may be forgotten."""
    granted: Future[Lease] = field(default_factory=Future)
