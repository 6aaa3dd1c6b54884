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
from .adam import adam_rate
from .attention import attention_curve
from .devicememory import device_memory_rate
from .dram import memory_rates
from .fingerprint import cpu_model
from .launch import launch_cost
from .products import DTYPES, linear_curve
from .timing import device_timer, host_timer

Attempt = Callable[[str, Callable[[], Any]], Any]
"""Calls the second and returns its result; None where that failed, under the name given first."""

SHARES: Final = {"memory": 0.15, "linear": 0.5, "attention": 0.15, "adam": 0.1, "launch": 0.1}
"""What each has of the time."""


@dataclass(frozen=True, kw_only=True)
class ProcessorProbe:
    """Measures a CPU or a GPU.

    Args:
        device: Which.
        nbytes: Of its memory to use at a time; activations and results come on top.
        seconds: For all of it, besides warming up.
        attempt: Carries out each measurement.
    """

    device: torch.device
    nbytes: int
    seconds: float
    attempt: Attempt

    def measure(self) -> Processor | None:
        """The processor in figures; None where neither its memory nor its products could be measured."""
        what = str(self.device)
        memory = self.attempt(f"{what} memory", self._memory)
        timer = device_timer(self.device)
        linear: dict[str, Curve] = {}
        attention: dict[str, Curve] = {}
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            for kind, probe, found in (("linear", linear_curve, linear), ("attention", attention_curve, attention)):
                seconds = self.seconds * SHARES[kind] / len(DTYPES)
                measured = self.attempt(
                    f"{what} {kind} {name}",
                    lambda probe=probe, dtype=dtype, seconds=seconds: probe(  # type: ignore[misc]
                        self.device, dtype, nbytes=self.nbytes, seconds=seconds, timer=timer
                    ),
                )
                if measured is not None:
                    found[name] = measured
        if memory is None:
            if not linear:
                return None
            memory = {"memory": Curve.flat(max(curve.y[0] for curve in linear.values()))}
        adam = self.attempt(
            f"{what} AdamW",
            lambda: adam_rate(self.device, nbytes=self.nbytes, seconds=self.seconds * SHARES["adam"], timer=timer),
        )
        launch = self.attempt(
            f"{what} launch",
            lambda: launch_cost(self.device, seconds=self.seconds * SHARES["launch"], timer=host_timer(self.device)),
        )
        name, nbytes, cores = self._facts()
        return Processor(
            name=name,
            memory_nbytes=nbytes,
            linear=linear,
            attention=attention,
            adam=adam.elements.value if adam else 0.0,
            launch_s=launch.operation.value if launch else 0.0,
            module_call_s=launch.module.value if launch else 0.0,
            cores=cores,
            **memory,
        )

    def _memory(self) -> dict[str, Curve]:
        seconds = self.seconds * SHARES["memory"]
        if self.device.type == "cuda":
            rate = device_memory_rate(self.device, nbytes=self.nbytes, seconds=seconds, timer=device_timer(self.device))
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
