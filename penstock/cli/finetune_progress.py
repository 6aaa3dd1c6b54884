"""How a fine-tuning run is getting on: a line that changes on a terminal, a line every some seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..runtime.training.distance import LinkRates, distance_of
from ..runtime.training.metrics import StepRecord
from ..scheduler.plan import Plan

EVERY_S: Final = 10.0
STEADY: Final = 20
"""Steps that the pace is the mean of: the first of a process are slow, while orders are learnt."""


class FinetuneProgress:
    """Told of every step. A context manager.

    Args:
        console: Where to.
        steps: Of the run.
        done: Of them, before this.
        rates: Of the links, for the distance.
        plan: Of the weights, for what the tiers hold.
        clock: Seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        done: int,
        rates: LinkRates,
        plan: Plan,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._rates = rates
        self._held = _held(plan)
        self._steps = steps
        self._clock = clock
        self._told: float | None = None
        self._recent: deque[StepRecord] = deque(maxlen=STEADY)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(f"step {done + 1}/{steps}", total=steps, completed=done)

    def __call__(self, record: StepRecord) -> None:
        """One more step is done."""
        self._recent.append(record)
        if self._bar is not None:
            self._bar.update(self._task, description=self._line(record), completed=record.step)
            if record.eval_loss is not None:
                told = f"step {record.step}/{self._steps}: evaluation loss {record.eval_loss:.4f}"
                self._bar.console.print(Text(told))
            return
        now, last = self._clock(), record.step == self._steps
        if self._told is None or last or record.eval_loss is not None or now - self._told >= EVERY_S:
            self._told = now
            self._console.print(Text(self._line(record)))

    def __enter__(self) -> FinetuneProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, record: StepRecord) -> str:
        seconds = sum(each.seconds for each in self._recent)
        tokens = sum(each.tokens for each in self._recent)
        each_s = seconds / len(self._recent)
        line = f"step {record.step}/{self._steps}  loss {record.loss:.4f}"
        if record.eval_loss is not None and self._bar is None:
            line += f"  evaluation {record.eval_loss:.4f}"
        if not record.updated:
            line += " (left out)"
        pace = f"{tokens / seconds:,.0f} tokens/s" if seconds else "-"
        left = duration(each_s * (self._steps - record.step))
        distance = distance_text(self._recent, self._rates)
        return f"{line}  {pace}  {each_s:.3g} s/step  {distance}{self._tiers()}  ETA {left}"

    def _tiers(self) -> str:
        """What each holds of its budget, and what a step moves."""
        count = len(self._recent)
        copied = sum(each.copied_nbytes for each in self._recent) / count
        read = sum(each.disk_read_nbytes for each in self._recent) / count
        written = sum(each.disk_written_nbytes for each in self._recent) / count
        parts = [*self._held]
        if copied:
            parts.append(f"copied {_gib(copied)}/step")
        parts.append(f"disk {_gib(read)} read, {_gib(written)} written/step" if read or written else "disk idle")
        return "; ".join(parts)


def distance_text(records: Sequence[StepRecord], rates: LinkRates) -> str:
    """The distance of these steps and what they are bound by, with two blanks behind; nothing where it is not known."""
    found = distance_of(records, rates)
    return "" if found.value is None else f"distance {found.value:.2f} ({found.binds})  "


def _held(plan: Plan) -> list[str]:
    tiers = [
        ("device", plan.device_nbytes, plan.device_budget_nbytes),
        ("host", plan.host_nbytes, plan.host_budget_nbytes),
    ]
    return [f"{name} {_gib(nbytes)} of {_gib(budget)}" for name, nbytes, budget in tiers if budget is not None]


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 0.95 * 2**30 else f"{nbytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
