"""One processor in figures: its memory, products, attention, AdamW, and what starting an operation takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...memory.capacity import host_capacity
from ...scheduler.curves import Curve
from ...scheduler.hardware import Processor
from .adam import WAYS, adam_rate
from .attention import POINTS, attention_curve
from .devicememory import device_memory_rate
from .dram import memory_rates
from .elementwise import elementwise_curve
from .fingerprint import cpu_model
from .framework import framework_cost
from .launch import launch_cost
from .products import DTYPES, ROWS, linear_curve
from .switching import switch_cost
from .timing import Timer, device_timer, host_timer

Attempt = Callable[[str, Callable[[], Any]], Any]
"""Calls the second and returns its result; None where that failed, under the name given first."""

SHARES: Final = {
    "memory": 0.12,
    "linear": 0.42,
    "attention": 0.15,
    "elementwise": 0.1,
    "adam": 0.08,
    "launch": 0.03,
    "framework": 0.07,
    "switching": 0.03,
}
"""What each has of the time."""
QUICK_DTYPES: Final = (torch.float32, torch.bfloat16)
QUICK_ROWS: Final = (1, 4, 16, 64, 256, 1024)
QUICK_POINTS: Final = (POINTS[0], POINTS[1], POINTS[4])
QUICK_WAYS: Final = ("fused", "single")
"""The second only where there is no first."""


@dataclass(frozen=True, kw_only=True)
class ProcessorProbe:
    """Measures a CPU or a GPU.

    Args:
        device: Which.
        nbytes: Of its memory to use at a time; activations and results come on top.
        seconds: For all of it, besides warming up.
        attempt: Carries out each measurement.
        quick: Measure fewer points.
    """

    device: torch.device
    nbytes: int
    seconds: float
    attempt: Attempt
    quick: bool = False

    def measure(self) -> Processor | None:
        """The processor in figures; None where neither its memory nor its products could be measured."""
        what = str(self.device)
        memory = self.attempt(f"{what} memory", self._memory)
        linear = self._by_dtype("linear", self._linear)
        attention = self._by_dtype("attention", self._attention)
        if memory is None:
            if not linear:
                return None
            memory = {"memory": Curve.flat(max(curve.y[0] for curve in linear.values()))}
        elementwise = self._by_dtype("elementwise", self._elementwise)
        adam = self.attempt(
            f"{what} AdamW",
            lambda: adam_rate(
                self.device,
                nbytes=self.nbytes,
                seconds=self.seconds * SHARES["adam"],
                timer=self._timer,
                ways=QUICK_WAYS if self.quick else WAYS,
            ),
        )
        launch = self.attempt(
            f"{what} launch",
            lambda: launch_cost(self.device, seconds=self.seconds * SHARES["launch"], timer=host_timer(self.device)),
        )
        framework = self.attempt(
            f"{what} framework",
            lambda: framework_cost(
                self.device, seconds=self.seconds * SHARES["framework"], timer=host_timer(self.device)
            ),
        )
        switch = None
        if self.device.type == "cpu":  # threads are the host's, whatever computes
            switch = self.attempt(f"{what} threads", lambda: switch_cost(seconds=self.seconds * SHARES["switching"]))
        started = framework or (launch.operation if launch else None)
        name, nbytes, cores = self._facts()
        return Processor(
            name=name,
            memory_nbytes=nbytes,
            linear=linear,
            attention=attention,
            adam=adam.elements.value if adam else 0.0,
            elementwise=elementwise,
            launch_s=started.value if started else 0.0,
            operation_s=launch.operation.value if launch else 0.0,
            module_call_s=launch.module.value if launch else 0.0,
            switch_s=switch.value if switch else 0.0,
            cores=cores,
            **memory,
        )

    def _by_dtype(self, kind: str, probe: Callable[[torch.dtype, float], Curve]) -> dict[str, Curve]:
        """Curves of one kind; dtypes that this torch refuses here are left out."""
        dtypes = QUICK_DTYPES if self.quick else DTYPES
        seconds = self.seconds * SHARES[kind] / len(dtypes)
        found: dict[str, Curve] = {}
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            measured = self.attempt(
                f"{self.device} {kind} {name}",
                lambda dtype=dtype: probe(dtype, seconds),  # type: ignore[misc]
            )
            if measured is not None:
                found[name] = measured
        return found

    def _linear(self, dtype: torch.dtype, seconds: float) -> Curve:
        rows = QUICK_ROWS if self.quick else ROWS
        return linear_curve(self.device, dtype, nbytes=self.nbytes, seconds=seconds, timer=self._timer, rows=rows)

    def _attention(self, dtype: torch.dtype, seconds: float) -> Curve:
        points = QUICK_POINTS if self.quick else POINTS
        return attention_curve(
            self.device, dtype, nbytes=self.nbytes, seconds=seconds, timer=self._timer, points=points
        )

    def _elementwise(self, dtype: torch.dtype, seconds: float) -> Curve:
        return elementwise_curve(self.device, dtype, seconds=seconds, timer=self._timer)

    @property
    def _timer(self) -> Timer:
        return device_timer(self.device)

    def _memory(self) -> dict[str, Curve]:
        seconds = self.seconds * SHARES["memory"]
        if self.device.type == "cuda":
            rate = device_memory_rate(self.device, nbytes=self.nbytes, seconds=seconds, timer=self._timer)
            return {"memory": rate}
        rates = memory_rates(nbytes=self.nbytes, threads=_thread_counts(), seconds=seconds)
        return {"memory": rates.copy, "memory_read": rates.read, "memory_write": rates.write}

    def _facts(self) -> tuple[str, int, int]:
        """Name, memory in bytes, cores."""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            return properties.name, properties.total_memory, 0
        return cpu_model(), host_capacity().total_nbytes, len(os.sched_getaffinity(0))


def _thread_counts() -> list[int]:
    """1, 2, 4, … and all cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})
