"""How much of a mixture of experts a sweep uses, if all experts are used alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """The experts of a model, as far as the time of a sweep depends on them."""

    share: float
    """Of the experts of a layer, what one token uses."""
    nbytes: int
    """Of all of them."""
    sweep_s: float = 0.0
    """Seconds for which the links would be busier, in a sweep that uses all of them."""

    def used(self, rows: float) -> float:
        """The part that so many tokens use together: an expert is left out where none of them wants it."""
        left_out: float = (1.0 - self.share) ** rows
        return 1.0 - left_out

    def moved_s(self, rows: float) -> float:
        """Seconds that the links need for those that so many tokens use and that are not there, each once."""
        return self.sweep_s * self.used(rows)
