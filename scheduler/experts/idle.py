"""What the link and the disk have left of a layer's time, once everything that the layer itself needs has been
moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .costs import ExpertCosts
from .layerscheduler import LayerPlan

Mover = Literal["link", "disk"]


@dataclass(kw_only=True, slots=True)
class IdleTime:
    """Taken from by whoever brings something that the layer does not need itself.

    Only what is left behind the last move of the layer counts: nothing is squeezed in between, where it could be late.
    """

    costs: ExpertCosts
    end_s: float
    """When the next layer may want something."""
    cpu_until_s: float
    """Until when the CPU computes, and would be slowed."""
    free_s: dict[Mover, float]
    """From when on each has nothing to do."""

    @staticmethod
    def behind(plan: LayerPlan, costs: ExpertCosts, between_s: float) -> IdleTime:
        """What a plan leaves.

        Args:
            plan: Of the layer.
            costs: It was made with.
            between_s: Time between its last expert and the next layer's first: attention, norms, gates.
        """
        timeline = plan.timeline
        return IdleTime(
            costs=costs,
            end_s=timeline.seconds + between_s,
            cpu_until_s=timeline.last_s("cpu"),
            free_s={"link": timeline.last_s("link"), "disk": timeline.last_s("disk")},
        )

    def seconds(self, mover: Mover) -> float:
        """Of one more expert, at full speed."""
        return self.costs.copy_s if mover == "link" else self.costs.read_s

    def has_room(self, mover: Mover) -> bool:
        """Whether one more expert can be moved before the next layer."""
        return self.free_s[mover] + self.seconds(mover) <= self.end_s

    def slows_by_s(self, mover: Mover) -> float:
        """How much longer the layer takes if one more is moved: the CPU is slowed while both use the memory. At most
        that; where the CPU is not what the layer waits for, less."""
        sharing = self.costs.sharing
        speed = sharing.compute_while_copying if mover == "link" else sharing.compute_while_reading
        both = min(self.seconds(mover), max(self.cpu_until_s - self.free_s[mover], 0.0))
        return both * (1 - speed)

    def take(self, mover: Mover) -> None:
        """Move one more."""
        self.free_s[mover] += self.seconds(mover)
