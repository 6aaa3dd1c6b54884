"""A layer of experts computed by two processors: a device its own, and the CPU what it computes from host memory.

Both begin at once. Rows are multiplied in other company than where one processor has them all, so results equal those
to rounding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...scheduler.experts.layerpass import LayerPass
from .grouped import Grouped, Lend

_CPU = torch.device("cpu")


class Split:
    """Computes layers with both processors. Has a thread, for the CPU's part."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-experts")

    def compute(self, tokens: Grouped, module: Any, run: LayerPass, lend: Lend, lend_host: Lend) -> torch.Tensor:
        """[T, H] What a layer gives.

        Args:
            tokens: Of the call.
            module: The layer's experts.
            run: Says who computes which.
            lend: Weights on the device.
            lend_host: Weights in host memory.
        """
        (here, places), (there, others) = tokens.shares(run.by_cpu)
        own = here.to(_CPU, module)

        def on_cpu() -> torch.Tensor:
            with torch.no_grad():
                return own.compute(module, run.by_cpu, lend_host)

        coming = self._thread.submit(on_cpu)
        try:
            state = there.compute(module, run.order, lend) if run.order else None
        finally:
            # Whatever the device met: the CPU must have let go of its weights before the layer ends.
            coming.exception()
        found = coming.result()
        out = found.new_empty((len(places) + len(others), found.shape[1]), device=others.device)
        out[places] = found.to(out.device)
        if state is not None:
            out[others] = state
        return tokens.summed(out)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def splittable(module: Any) -> bool:
    """Whether the CPU can compute experts of a module: beside weights they need nothing that lies on the device, but
    biases."""
    return not getattr(module, "has_post_expert_norm", False)
