"""What is shown while the first sweep brings the weights, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn


class FirstSweep(Progress):
    """A bar that follows a counter of bytes and disappears when it is stopped.

    Args:
        total_nbytes: Where the bar is full.
        done_nbytes: How far it is; asked for at each refresh.
    """

    def __init__(self, console: Console, total_nbytes: int, done_nbytes: Callable[[], int]) -> None:
        self._total_nbytes = total_nbytes
        self._done_nbytes = done_nbytes
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bar = self.add_task("first sweep", total=total_nbytes)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar as it stands now (called by rich's refresh thread)."""
        for task in self.tasks:  # none yet while the base class is being made
            task.completed = min(self._done_nbytes(), self._total_nbytes)
        yield from super().get_renderables()


def first_sweep(
    console: Console, total_nbytes: int, done_nbytes: Callable[[], int]
) -> AbstractContextManager[FirstSweep | None]:
    """The bar on a terminal, nothing elsewhere."""
    return FirstSweep(console, total_nbytes, done_nbytes) if console.is_terminal and total_nbytes else nullcontext()
