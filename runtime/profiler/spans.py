"""A span that has ended, and is recorded once its times are known: a device tells them later."""

from __future__ import annotations

from .recorder import Recorder
from .schema import Compute, Phase


class Spanned:
    """What a clock calls with the times of a span."""

    __slots__ = ("depth", "lane", "phase", "recorder", "row")

    def __init__(self, recorder: Recorder, row: int, phase: Phase, lane: int, depth: int) -> None:
        self.recorder, self.row, self.phase, self.lane, self.depth = recorder, row, phase, lane, depth

    def __call__(self, launched: int, start: int, end: int) -> None:
        """Record it: when the host asked for it (-1 for then), when it began and ended, in nanoseconds."""
        self.recorder.add(
            Compute(
                module=self.row,
                phase=self.phase,
                start=start,
                end=end,
                lane=self.lane,
                launched=launched,
                depth=self.depth,
            )
        )
