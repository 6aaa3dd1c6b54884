"""LoHan (Fuyou, Ratel): fine-tuning with all states on NVMe, the optimizer on the CPU while backward runs.

Sources: its paper (arXiv 2403.06504) and code (RC4ML/LoHan at feb88fe: main.py, ratel_init.py, utils.py, config.json).
Parameters are prefetched in order, three layers deep, from NVMe through host memory. The input of each block is kept in
host memory and the rest recomputed. Gradients leave during backward; a process of its own reads master weights and
moments (12 bytes per parameter), steps, and writes them and the fp16 weights back, a layer behind. Drives read or write
at a time. The model of its benchmark has no head: its loss is on hidden states.

Constants: `thread_count` is 2 in its config.json.
TFLOPS are those of forward, recomputation and backward, 8 per parameter and token: the authors' script does not say;
otherwise its figures would be far from what the GPU can do.
"""

from __future__ import annotations

from ..hardware import Hardware
from ..modelshape import ModelShape
from ..schedule import Slots, TaskGraph
from ..work import Work
from .costs import Costs
from .prediction import Pass, Prediction, repeated, trained
from .system import Options, absurd, device, drives, only, options
from .training import THREAD_RATE, Layerwise, operations

DEPTH = 3
OPTIMIZER_BUFFERS = 2


class LohanOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of its config.json."""

    io_threads: int = 2
    recompute: bool = True
    """Otherwise activations are kept on the GPU, which must hold them."""


class Lohan:
    """The policy."""

    name = "lohan"
    summary = "LoHan (Fuyou): fine-tuning from NVMe, CPU Adam overlapped with backward"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("finetune",))
        device(hardware, self.name)
        drives(hardware, self.name)
        chosen = options(work, LohanOptions, self.name)
        if chosen.io_threads < 1:
            raise absurd(self.name, "io_threads", chosen.io_threads, "1 or more")
        costs = Costs(hardware=hardware, model=model)
        limit = chosen.io_threads * THREAD_RATE
        layer = Layerwise.of(
            costs,
            work.batch,
            work.context,
            read=min(hardware.disk_read, limit),
            write=min(hardware.disk_write, limit),
            recompute=chosen.recompute,
        )
        forward = repeated(model.depth, lambda depth: self._forward(depth, layer))
        backward = repeated(model.depth, lambda depth: self._backward(depth, layer))
        step = Pass.chain((forward, backward))
        factor = 8 if chosen.recompute else 6
        notes = [*model.notes, f"TFLOPS count {factor} operations per parameter and token"]
        return trained(self.name, work, step, operations(model, work.tokens, factor), hardware.gpus, notes)

    def _forward(self, depth: int, layer: Layerwise) -> TaskGraph:
        graph, slots = TaskGraph({"disk": 1.0}), Slots(DEPTH)
        for _ in range(depth):
            used = layer.fetch(graph, slots)
            computed = graph.add("forward", "gpu", layer.forward, after=[used])
            slots.use(computed)
            graph.add("keep input", "d2h", layer.kept_d2h, after=[computed])
        return graph

    def _backward(self, depth: int, layer: Layerwise) -> TaskGraph:
        graph, slots, buffers = TaskGraph({"disk": 1.0}), Slots(DEPTH), Slots(OPTIMIZER_BUFFERS)
        for _ in range(depth):
            fetched = layer.fetch(graph, slots)
            restored = graph.add("load input", "h2d", layer.kept_h2d)
            computed = graph.add("backward", "gpu", layer.backward, after=[fetched, restored])
            slots.use(computed)
            gradients = graph.add("gradients", "d2h", layer.gradients, after=[computed])
            states = layer.on_disk(graph, "read states", "disk.read", layer.states_read, after=buffers.take())
            stepped = graph.add("adam", "cpu", layer.adam, after=[gradients, states])
            buffers.use(layer.on_disk(graph, "write states", "disk.write", layer.states_written, after=[stepped]))
        return graph
