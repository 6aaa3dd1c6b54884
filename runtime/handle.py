"""`model.penstock`: what a user can ask of a streamed model, and how it ends."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import nn

from ..memory.arena import ArenaStatistics
from ..memory.disk import DiskStatistics
from ..memory.errors import ClosedError, UsageError
from ..scheduler.experts.account import PoolStatistics
from ..scheduler.plan import Plan
from ..scheduler.tally import ExecutorStatistics
from ..scheduler.timeline import Timeline
from .build import Machinery
from .devices.base import Device
from .gather import gathered

if TYPE_CHECKING:
    from .explain import Explanation

SEEN: Final = 16
"""Tokens that must have been continued before what was measured of experts says more than what is expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Totals of one model since it was loaded."""

    disk_read_nbytes: int
    """All reads."""
    rows_read_nbytes: int
    """Of them, lookups in tables that are served by rows."""
    disk_written_nbytes: int
    h2d_nbytes: int
    acquires: int
    prefetched_on_time: int
    """Acquires that found their block ready."""
    late: int
    demand_fetches: int
    """Acquires of blocks that nothing had asked for."""
    waited_s: float
    """Time that consumers waited for blocks."""
    relearned: int
    """Root calls whose order was new."""
    wasted: int
    """Blocks brought and dropped unused."""
    arenas: tuple[ArenaStatistics, ...]
    disk: DiskStatistics | None
    executor: ExecutorStatistics | None
    experts: PoolStatistics | None = None
    """Of experts that are blocks of their own; None where there are none."""


class Handle:
    """The runtime of one model. Reached as `model.penstock`."""

    def __init__(self, module: nn.Module, plan: Plan, machinery: Machinery | None) -> None:
        self.plan = plan
        """What was decided: tiers, bytes per sweep, bound."""
        self.exact = False
        """Whether nothing may be computed in a way whose results are equal to rounding only."""
        self._experts_text: str | None = None
        """What is foreseen of experts, once somebody wanted to know."""
        self._module = weakref.ref(module)
        self._machinery = machinery
        self._finalizer: Callable[[], Any] | None = None
        if machinery is not None:
            self._finalizer = weakref.finalize(module, _close_elsewhere, machinery)

    @property
    def device(self) -> Device | None:
        """What the model runs on, for a cache of keys and values that is to share its links; None where a module was
        left as it was."""
        return None if self._machinery is None else self._machinery.device

    @property
    def machinery(self) -> Machinery | None:
        """What runs the model, for the rest of the runtime; None where a module was left as it was."""
        return self._machinery

    @property
    def timeline(self) -> Timeline:
        """Records of reads, copies and waits."""
        return Timeline(1) if self._machinery is None else self._machinery.timeline

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._machinery is not None and self._machinery.session.closed

    @property
    def streams(self) -> bool:
        """Whether the weights are in penstock's hands, and not closed."""
        return self._machinery is not None and not self.closed

    def statistics(self) -> Statistics:
        """A frozen record of the totals."""
        machinery = self._machinery
        if machinery is None:
            return Statistics(
                disk_read_nbytes=0,
                rows_read_nbytes=0,
                disk_written_nbytes=0,
                h2d_nbytes=0,
                acquires=0,
                prefetched_on_time=0,
                late=0,
                demand_fetches=0,
                waited_s=0.0,
                relearned=0,
                wasted=0,
                arenas=(),
                disk=None,
                executor=None,
            )
        disk, executor = machinery.engine.statistics(), machinery.executor.statistics()
        arenas = {id(arena): arena.statistics() for arena in (machinery.front_arena, machinery.host)}
        return Statistics(
            disk_read_nbytes=disk.read_nbytes,
            rows_read_nbytes=sum(table.rows_read_nbytes for table in machinery.tables.values()),
            disk_written_nbytes=disk.written_nbytes,
            h2d_nbytes=machinery.mover.copied_nbytes,
            acquires=executor.acquires,
            prefetched_on_time=executor.on_time,
            late=executor.late,
            demand_fetches=executor.demanded,
            waited_s=executor.waited_ns / 1e9,
            relearned=executor.orders.relearned,
            wasted=executor.wasted,
            arenas=tuple(arenas.values()),
            disk=disk,
            executor=executor,
            experts=None if machinery.session.experts is None else machinery.session.experts.statistics(),
        )

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[nn.Module]:
        """Lend a module (the model itself or a part) its real weights, for reading, while the context lasts.

        See `gather.gathered` for what it costs.

        Raises:
            ReadOnlyWeightError: on leaving, if a weight was changed.
        """
        machinery = self._machinery
        if machinery is None or machinery.lent_for_good:
            yield module
            return
        if self.closed:
            raise ClosedError("the model was closed by penstock.close(); load it again")
        with gathered(machinery, module):
            yield module

    def close(self) -> None:
        """Stop threads and give all memory back. The model cannot run afterwards.

        Raises:
            PenstockError: what the last step of a training met, if nobody has heard of it. All is closed nevertheless.
        """
        module = self._module()
        if self._machinery is None or self.closed:
            return
        try:
            self._machinery.close()
        finally:
            if module is not None and self.plan.resident:
                module.forward = _closed_forward

    def explained(self) -> Explanation:
        """The plan in words, with what is known of experts: what they missed, once some tokens have been continued, and
        what they are expected to miss before that."""
        from .explain import Explanation, foreseen_text, measured_text

        machinery = self._machinery
        experts = None if machinery is None else machinery.session.experts
        if machinery is None or experts is None:
            return Explanation(self.plan)
        counted = experts.statistics().decode
        if counted.tokens >= SEEN:
            return Explanation(self.plan, measured_text(counted))
        if self._experts_text is None:
            self._experts_text = foreseen_text(experts.outlook(machinery.costs, exact=self.exact))
        return Explanation(self.plan, self._experts_text)

    def _repr_html_(self) -> str:
        from .explain import explain_html

        return explain_html(self)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UsageError("a streamed model cannot be copied: its weights are in files; load it a second time instead")

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a streamed model cannot be pickled: its weights are in files; load it in the other process instead"
        )


def _closed_forward(*args: Any, **kwargs: Any) -> NoReturn:
    raise ClosedError("the model was closed by penstock.close(); load it again")


def _close_elsewhere(machinery: Machinery) -> None:
    """Close from a finalizer, which the garbage collector may run in one of the very threads that must end."""
    if os.getpid() != machinery.session.pid:
        return
    if threading.current_thread().name.startswith("penstock-"):
        threading.Thread(target=machinery.close, name="closing-penstock").start()
    else:
        machinery.close()


def refuse_moves(module: nn.Module, device: torch.device) -> None:
    """Let `.to`, `.half` and their kin raise with the remedy, unless they would change nothing."""
    plain_to = module.to

    def to(*args: Any, **kwargs: Any) -> nn.Module:
        wanted, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        same = wanted is None or (wanted.type == device.type and wanted.index in (None, device.index))
        first = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        if same and dtype in (None, first):
            return module
        return plain_to(*args, **kwargs)

    def apply(*args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(
            "a streamed model cannot be moved or cast (.to, .half, .cuda, …): its weights pass through a fixed budget. "
            "Load it again with penstock.load(path, device=…, dtype=…)"
        )

    for child in module.modules():
        child._apply = apply  # type: ignore[method-assign]
    module.to = to  # type: ignore[method-assign]
