"""How long kernels lie in a device's queue: TKLQT, the sum of (start − launch) over all launches (arXiv 2504.11750).

In kineto's events a kernel and the runtime call that launched it have the same correlation id. Ids of other things
(operators, annotations) are counted separately and may be equal to theirs, so both sides are told by what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol

import torch

_autograd: Final[Any] = torch._C._autograd  # torch leaves some of it untyped
_CUDA: Final = _autograd.DeviceType.CUDA
_LAUNCHES: Final = (
    *("cudaLaunch", "cudaGraphLaunch", "cuLaunch", "cuGraphLaunch"),
    *("hipLaunch", "hipExtLaunch", "hipModuleLaunch", "hipExtModuleLaunch", "hipGraphLaunch"),
)
"""How the names of calls begin that put kernels into a queue."""
_NO_KERNELS: Final = ("Memcpy", "Memset")
"""How kineto names what else a device does."""


class KinetoEvent(Protocol):
    """Of `torch._C._autograd._KinetoEvent`, what is needed here."""

    def name(self) -> str:
        """Of a kernel, or of a function of the runtime."""
        ...

    def device_type(self) -> Any:
        """Where it happened."""
        ...

    def start_ns(self) -> int:
        """On one clock for all events."""
        ...

    def correlation_id(self) -> int:
        """0 for none."""
        ...

    def is_user_annotation(self) -> bool:
        """Whether it is a range that the program named."""
        ...


class Queued(NamedTuple):
    """What a number of events come to."""

    launches: int
    """Those whose kernel was seen too."""
    ns: int


def queued(events: Iterable[KinetoEvent]) -> Queued:
    """Σ (start − launch), of launches whose kernel is among the events.

    A launch of a graph counts once, up to its first kernel. What ran before its launch, as clocks that differ by a
    little can have it, has queued for no time.
    """
    launched: dict[int, int] = {}
    started: dict[int, int] = {}
    for event in events:
        number = event.correlation_id()
        if not number:
            continue
        name = event.name()
        if event.device_type() == _CUDA:
            if not name.startswith(_NO_KERNELS) and not event.is_user_annotation():
                at = event.start_ns()
                started[number] = min(at, started.get(number, at))
        elif name.startswith(_LAUNCHES):
            launched[number] = event.start_ns()
    waits = [max(0, started[number] - at) for number, at in launched.items() if number in started]
    return Queued(launches=len(waits), ns=sum(waits))
