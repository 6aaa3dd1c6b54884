"""Which experts of the next layer are brought before it asks: those that a simulation says gain time, while a link
rests.

HybriMoE's impact: the next layer's time without an expert in place, less its time with it. The next layer's gate, asked
about this layer's hidden state, says which experts it would need. It can be wrong, and the more so the lower an expert
stands with it, so the gain counts with the share of earlier advice of that rank that was right; and it costs, where the
CPU computes meanwhile and memory is shared. When the two have been compared often enough and the gains do not make up
for the costs, prefetching stops for a while, and says so.

What is read from disk for nothing is read beside what is needed: advice that is wrong too often is not followed there,
whatever it gains.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final

from .idle import IdleTime, Mover
from .layerscheduler import LayerScheduler
from .timelines import ExpertTask

logger = logging.getLogger(__name__)

TRIAL: Final = 64
"""Prefetched experts after which gains are held against costs."""
PAUSE: Final = 512
"""Layers that pass without prefetching after a trial that did not pay. Doubles each time."""
SURE: Final = 0.9
"""Of advice of a rank, the share that must be right before an expert is read from disk by it."""
KINDS: Final = 8
"""Of experts that could be brought next, kinds whose gain is worked out: those that stand highest, and of these those
that most tokens want. Each takes a simulation."""
LEAST_GAIN: Final = 0.005
"""Of the next layer's time: less than what such a simulation is wrong by is no gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefetched:
    """One expert to be brought."""

    expert: int
    mover: Mover
    """link: host to device memory. disk: disk to host memory."""
    cost_s: float
    """What the layer that runs meanwhile loses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchStatistics:
    """What came of it so far."""

    asked: int
    """Layers for which there was advice."""
    busy: int
    """Of these: layers where no link was idle for long enough."""
    prefetched: int
    used: int
    gained_s: float
    """What layers took less because of it, less what it cost others, and what deciding took."""
    off: str
    """Why nothing is prefetched now; "" where it is."""

    def plus(self, other: PrefetchStatistics) -> PrefetchStatistics:
        """Both together."""
        return PrefetchStatistics(
            asked=self.asked + other.asked,
            busy=self.busy + other.busy,
            prefetched=self.prefetched + other.prefetched,
            used=self.used + other.used,
            gained_s=self.gained_s + other.gained_s,
            off="; ".join(dict.fromkeys(each for each in (self.off, other.off) if each)),
        )


class Prefetcher:
    """Decides, and learns what its decisions were worth.

    Args:
        scheduler: Plans layers.
        most: Experts that can be held apart from the cache until the next layer.
    """

    def __init__(self, scheduler: LayerScheduler, *, most: int, trial: int = TRIAL, pause: int = PAUSE) -> None:
        self._scheduler = scheduler
        self._most = most
        self._trial = trial
        self._pause = pause
        self._asked = self._busy = self._prefetched = self._used = 0
        self._gained_s = 0.0
        self._tried = 0
        self._tried_used = 0
        self._tried_s = 0.0
        self._tried_layers = 0
        """Layers with advice, since the last trial."""
        self._ranked = False
        """Whether it is known how high experts stand."""
        self._ranks: Mapping[int, int] = {}
        """Of the experts that were last expected, how high each stood with the gate."""
        self._right: Counter[int] = Counter()
        self._heard: Counter[int] = Counter()
        """By rank, advice that was right, and all."""
        self._resting = 0
        """Layers until prefetching is tried again."""
        self._off = ""

    def statistics(self) -> PrefetchStatistics:
        """What came of it so far."""
        return PrefetchStatistics(
            asked=self._asked,
            busy=self._busy,
            prefetched=self._prefetched,
            used=self._used,
            gained_s=self._gained_s,
            off=self._off,
        )

    def choose(
        self, expected: Sequence[ExpertTask], idle: IdleTime, *, ranks: Mapping[int, int] | None = None
    ) -> tuple[Prefetched, ...]:
        """What is to be brought now.

        Args:
            expected: What the next layer will need, as far as is known, and where that is.
            idle: What the layer that runs now leaves; what is chosen is taken from it.
            ranks: By expert, how high it stands with the gate; all alike without.
        """
        self._asked += 1
        self._ranked = ranks is not None
        self._ranks = {task.expert: 0 for task in expected} if ranks is None else dict(ranks)
        if self.pauses():
            return ()
        self._tried_layers += 1
        if self._tried_layers >= PAUSE and self._tried_s < 0:  # deciding takes time, also where nothing is brought
            self._judge()
            return ()
        if not any(idle.has_room(mover) for mover in ("link", "disk")):
            self._busy += 1
            return ()
        chosen: list[Prefetched] = []
        tasks = sorted(expected, key=lambda task: (self._ranks[task.expert], -task.rows))
        now_s = self._scheduler.plan(tasks).seconds if tasks else 0.0
        while len(chosen) < self._most:
            found = self._best(tasks, {each.expert for each in chosen}, now_s, idle)
            if found is None:
                break
            number, mover, now_s = found
            chosen.append(Prefetched(expert=tasks[number].expert, mover=mover, cost_s=idle.slows_by_s(mover)))
            tasks[number] = _moved(tasks[number], mover)
            idle.take(mover)
        return tuple(chosen)

    def pauses(self) -> bool:
        """Whether nothing is prefetched for one more layer, because the last trial did not pay."""
        if not self._off:
            return False
        self._resting -= 1
        if self._resting > 0:
            return True
        self._off = ""
        return False

    def settle(self, needed: Sequence[ExpertTask], prefetched: Sequence[Prefetched]) -> float:
        """Learn what was needed after all; what was gained by it, in seconds.

        Args:
            needed: By the layer that has come now, each where it would be without having been prefetched.
            prefetched: What was brought for it.
        """
        self._learn({task.expert for task in needed})
        if not prefetched:
            return 0.0
        movers = {each.expert: each.mover for each in prefetched}
        used = [task for task in needed if task.expert in movers]
        gained = -sum(each.cost_s for each in prefetched)
        if used:
            there = [_moved(t, movers[t.expert]) if t.expert in movers else t for t in needed]
            gained += self._scheduler.plan(needed).seconds - self._scheduler.plan(there).seconds
        self._prefetched += len(prefetched)
        self._used += len(used)
        self._gained_s += gained
        self._tried += len(prefetched)
        self._tried_used += len(used)
        self._tried_s += gained
        if self._tried >= self._trial:
            self._judge()
        return gained

    def spent(self, seconds: float) -> None:
        """Deciding has taken so long."""
        self._gained_s -= seconds
        self._tried_s -= seconds

    def _learn(self, needed: Set[int]) -> None:
        """Hold what was last expected against what is needed, whether it was brought or not."""
        for expert, rank in self._ranks.items():
            self._heard[rank] += 1
            self._right[rank] += expert in needed
        self._ranks = {}

    def _judge(self) -> None:
        """End a trial."""
        if self._tried_s <= 0:
            self._off = (
                f"of the last {self._tried} prefetched experts {self._tried_used} were used, and they cost "
                f"{-self._tried_s * 1e3:.3g} ms more than they saved; tried again in {self._pause} layers"
            )
            logger.info("prefetching of experts is off: %s", self._off)
            self._resting = self._pause
            self._pause *= 2
        self._tried = self._tried_used = self._tried_layers = 0
        self._tried_s = 0.0

    def _best(
        self, tasks: Sequence[ExpertTask], moved_already: Set[int], now_s: float, idle: IdleTime
    ) -> tuple[int, Mover, float] | None:
        """The task whose move gains most, how it is moved, and what the layer takes then.

        Each expert moves by one tier: what is read now is not there to be copied yet.
        """
        best: tuple[float, int, Mover, float] | None = None
        tried: set[tuple[int, bool, Mover | None, int]] = set()
        for number, task in enumerate(tasks):
            mover = _mover(task, separate=self._scheduler.costs.separate)
            rank = self._ranks[task.expert]
            kind = (task.rows, task.on_host, mover, rank)
            if mover is None or kind in tried or task.expert in moved_already or not idle.has_room(mover):
                continue
            if len(tried) == KINDS:
                break
            tried.add(kind)  # those that are alike gain the same
            sure = self._reliability(rank)
            if mover == "disk" and self._ranked and sure < SURE:
                continue
            moved = [*tasks[:number], _moved(task, mover), *tasks[number + 1 :]]
            seconds = self._scheduler.plan(moved).seconds
            gain = sure * (now_s - seconds) - idle.slows_by_s(mover)
            if gain > LEAST_GAIN * now_s and (best is None or gain > best[0]):
                best = gain, number, mover, seconds
        return best[1:] if best is not None else None

    def _reliability(self, rank: int) -> float:
        """The share of advice of a rank that is right: as before, and before there is experience one half."""
        return (self._right[rank] + 1) / (self._heard[rank] + 2)


def _mover(task: ExpertTask, *, separate: bool) -> Mover | None:
    """What would bring a task one tier nearer; None where it is as near as it can be."""
    if task.on_device:
        return None
    if not task.on_host:
        return "disk"
    return "link" if separate else None


def _moved(task: ExpertTask, mover: Mover) -> ExpertTask:
    return replace(task, on_device=True) if mover == "link" else replace(task, on_host=True)
