"""A layer of experts computed by two processors: a device its own, and the CPU what it computes from host memory.

Both begin at once. Rows are multiplied in other company than where one processor has them all, so results equal those
to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...scheduler.experts.layerpass import LayerPass
from .grouped import Grouped, Lend, compute_shares

_CPU = torch.device("cpu")


class Split:
    """Computes layers with both processors. Has a thread, for the CPU's part."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-experts")

    def compute(
        self, tokens: Sequence[Grouped], module: Any, run: LayerPass, lend: Lend, lend_host: Lend
    ) -> list[torch.Tensor]:
        """[T, H] for the tokens of each call: what a layer gives.

        Args:
            tokens: Of the calls.
            module: The layer's experts.
            run: Says who computes which.
            lend: Weights on the device.
            lend_host: Weights in host memory.
        """
        pairs = [each.shares(run.by_cpu) for each in tokens]
        own = [share.to(_CPU, module) for (share, _), _ in pairs if share.rows]
        others = [share for _, (share, _) in pairs if share.rows]

        def on_cpu() -> list[torch.Tensor]:
            with torch.no_grad():
                return compute_shares(own, module, run.by_cpu, lend_host)

        coming = self._thread.submit(on_cpu)
        try:
            on_device = iter(compute_shares(others, module, run.order, lend))
        finally:
            # Whatever the device met: the CPU must have let go of its weights before the layer ends.
            coming.exception()
        by_cpu = iter(coming.result())
        found = []
        for each, ((first, places), (second, rest)) in zip(tokens, pairs, strict=True):
            parts = [(places, next(by_cpu))] if first.rows else []
            parts += [(rest, next(on_device))] if second.rows else []
            out = parts[0][1].new_empty((len(places) + len(rest), parts[0][1].shape[1]), device=rest.device)
            for rows, state in parts:
                out[rows] = state.to(out.device)
            found.append(each.summed(out))
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def splittable(module: Any) -> bool:
    """Whether the CPU can compute experts of a module: beside weights they need nothing that lies on the device, but
    biases."""
    return not getattr(module, "has_post_expert_norm", False)
