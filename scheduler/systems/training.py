"""What one layer takes in a step of training, for systems that pass through layers one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..modelshape import ModelShape
from ..operations import Operation
from ..schedule import Slots, TaskGraph
from .costs import Costs

MASTER = 12
"""Bytes per parameter of master weights and two moments, in fp32."""

THREAD_RATE = 13.2e9
"""Bytes per second of one thread of DeepSpeed's asynchronous I/O, at most: 12.3 GiB/s is the highest that one handle
reached into host memory (row deepspeede-034). That this was one thread is an assumption."""


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """Seconds of the parts of one layer, each alone on its resource; 0 where a part does not happen."""

    parameters_read: float
    parameters_h2d: float
    forward: float
    backward: float
    """With recomputation, where there is."""
    kept_d2h: float
    """The input of the layer, which recomputation starts from."""
    kept_h2d: float
    gradients: float
    states_read: float
    states_written: float
    """Weights in the model's dtype among them."""
    adam: float

    @classmethod
    def of(
        cls,
        costs: Costs,
        sequences: int,
        context: int,
        *,
        read: float,
        write: float,
        copies: float = 1.0,
        recompute: bool = True,
        parameters_on_disk: bool = True,
        states_on_disk: bool = True,
    ) -> Layerwise:
        """Of a machine and a model.

        Args:
            costs: Of machine and model.
            sequences: On all devices together.
            context: Tokens of each.
            read: Bytes per second from all drives.
            write: The same to them.
            copies: What of the link's rate copies reach.
            recompute: Activations are computed again in backward.
            parameters_on_disk: Otherwise in host memory.
            states_on_disk: Likewise.
        """
        model, hardware = costs.model, costs.hardware
        assert hardware.link is not None, "systems ask for the device first"
        devices = hardware.gpus
        parameters = model.layer_parameters / model.depth
        nbytes = model.layer_nbytes
        forward = costs.layer(sequences / devices, context, context)
        kept = sequences / devices * context * model.hidden * max(model.itemsize, 2)
        h2d, d2h = copies * hardware.link.h2d.best, copies * hardware.link.d2h.best
        adam = costs.cost.operation_s(Operation(kind="adam", nbytes=parameters), "cpu")
        return cls(
            parameters_read=nbytes / read if parameters_on_disk else 0.0,
            parameters_h2d=nbytes / devices / h2d,
            forward=forward,
            backward=forward * (3 if recompute else 2),
            kept_d2h=kept / d2h if recompute else 0.0,
            kept_h2d=kept / h2d if recompute else 0.0,
            gradients=nbytes / devices / d2h,
            states_read=MASTER * parameters / read if states_on_disk else 0.0,
            states_written=((MASTER * parameters if states_on_disk else 0.0) + (nbytes if parameters_on_disk else 0.0))
            / write,
            adam=adam,
        )

    def fetch(self, graph: TaskGraph, slots: Slots) -> int:
        """Bring the layer's weights to the device, as soon as a slot is free."""
        read = self.on_disk(graph, "read weights", "disk.read", self.parameters_read, after=slots.take())
        return graph.add("copy weights", "h2d", self.parameters_h2d, after=[read])

    def on_disk(self, graph: TaskGraph, name: str, lane: str, seconds: float, after: Iterable[int]) -> int:
        """Reads and writes go on side by side and share the drives' time: `graph` has 1 second of "disk" per second."""
        return graph.add(name, lane, seconds, after=after, shared="disk", nbytes=seconds)


def operations(model: ModelShape, tokens: float, per_parameter: float) -> float:
    """Of a step, by the usual count."""
    return per_parameter * model.layer_parameters * tokens
