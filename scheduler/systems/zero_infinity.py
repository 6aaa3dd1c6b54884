"""DeepSpeed ZeRO-Infinity: training with parameters, gradients and optimizer states on NVMe or in host memory.

Sources: its paper (arXiv 2104.07857) and DeepSpeed's stage3.py, partitioned_param_swapper.py and offload_config.py.
Parameters are fetched for forward and backward as in ZeRO-Inference (its constants hold here). Checkpoints of
activations go to host memory, the rest is recomputed. Where states are on NVMe, gradients are written there in fp32
during backward, and read again. The step starts after the whole backward: for each sub-group read, Adam on the CPU,
write, one after the other (`pipeline_read` and `pipeline_write` are off by default).
TFLOPS are those of forward, recomputation and backward, as in the paper.
"""

from __future__ import annotations

from typing import Literal

from ...memory.errors import DoesNotFitError
from ..hardware import Hardware
from ..modelshape import ModelShape
from ..schedule import Slots, TaskGraph
from ..work import Work
from .costs import Costs
from .prediction import Pass, Prediction, repeated, trained
from .system import Options, absurd, device, drives, only, options
from .training import MASTER, THREAD_RATE, Layerwise, operations
from .zero_inference import COPIES, OVERLAPPED_READS

BUFFERS = 5


class ZeroInfinityOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration file of DeepSpeed says."""

    parameters: Literal["cpu", "nvme"] = "nvme"
    """offload_param.device"""
    optimizer: Literal["cpu", "nvme"] = "nvme"
    """offload_optimizer.device"""
    io_threads: int = 1
    """aio.thread_count; DeepSpeed's default is 1."""
    pipelined: bool = False
    """pipeline_read and pipeline_write."""


class ZeroInfinity:
    """The policy."""

    name = "zero-infinity"
    summary = "DeepSpeed ZeRO-Infinity: training from NVMe or host memory, the optimizer after backward"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("finetune",))
        _, link = device(hardware, self.name)
        chosen = options(work, ZeroInfinityOptions, self.name)
        on_disk = "nvme" in (chosen.parameters, chosen.optimizer)
        if on_disk:
            drives(hardware, self.name)
        self._check(hardware, model, chosen)
        if chosen.io_threads < 1:
            raise absurd(self.name, "io_threads", chosen.io_threads, "1 or more")
        limit = chosen.io_threads * THREAD_RATE
        read, write = min(hardware.disk_read, limit), min(hardware.disk_write, limit)
        costs = Costs(hardware=hardware, model=model)
        layer = Layerwise.of(
            costs,
            work.batch,
            work.context,
            read=read if on_disk else 1.0,
            write=write if on_disk else 1.0,
            copies=COPIES,
            parameters_on_disk=chosen.parameters == "nvme",
            states_on_disk=chosen.optimizer == "nvme",
        )
        devices = hardware.gpus
        gathered = model.layer_nbytes * (devices - 1) / devices / (link.peer or link.h2d.best)
        flushed = 2 * model.layer_nbytes if chosen.optimizer == "nvme" else 0.0  # gradients in fp32
        forward = repeated(model.depth, lambda depth: self._through(depth, layer, gathered, 0.0, backward=False))
        backward = repeated(
            model.depth,
            lambda depth: self._through(depth, layer, gathered, flushed / write if flushed else 0.0, backward=True),
        )
        head = 4 * costs.head(work.tokens / devices)
        step = self._step(layer, flushed / read if flushed else 0.0, chosen.pipelined).times(model.depth)
        whole = Pass.chain((forward, backward, Pass.serial(gpu=head), step))
        notes = [*model.notes, "TFLOPS count 8 operations per parameter and token"]
        return trained(self.name, work, whole, operations(model, work.tokens, 8), devices, notes)

    def _check(self, hardware: Hardware, model: ModelShape, chosen: ZeroInfinityOptions) -> None:
        needed = 2 * model.nbytes if chosen.parameters == "cpu" else 0  # gradients beside the weights
        needed += MASTER * model.parameters if chosen.optimizer == "cpu" else 0
        if needed > hardware.host_nbytes:
            raise DoesNotFitError(
                f"{needed / 1e9:.0f} GB of weights, gradients and states in {hardware.host_nbytes / 1e9:.0f} GB of "
                "host memory: write nvme for parameters or optimizer",
                tier="host",
                needed_nbytes=needed,
                available_nbytes=hardware.host_nbytes,
            )

    def _through(self, depth: int, layer: Layerwise, gathered: float, flush: float, *, backward: bool) -> TaskGraph:
        graph, slots, copied = TaskGraph({"disk": 1.0}), Slots(BUFFERS), -1
        for _ in range(depth):
            seconds = layer.parameters_read
            early = layer.on_disk(graph, "read ahead", "disk.read", OVERLAPPED_READS * seconds, after=slots.take())
            after = [early, copied] if copied >= 0 else [early]
            late = layer.on_disk(graph, "read", "disk.read", (1 - OVERLAPPED_READS) * seconds, after=after)
            copied = graph.add("copy weights", "h2d", layer.parameters_h2d + gathered, after=[late])
            slots.use(copied)
            restored = graph.add("load input", "h2d", layer.kept_h2d if backward else 0.0)
            name, taken = ("backward", layer.backward) if backward else ("forward", layer.forward)
            computed = graph.add(name, "gpu", taken, after=[copied, restored])
            if backward:
                moved = graph.add("gradients", "d2h", layer.gradients, after=[computed])
                layer.on_disk(graph, "flush gradients", "disk.write", flush, after=[moved])
            else:
                graph.add("keep input", "d2h", layer.kept_d2h, after=[computed])
        return graph

    def _step(self, layer: Layerwise, gradients_read: float, pipelined: bool) -> Pass:
        disk = layer.states_read + gradients_read + layer.states_written
        if pipelined:
            return Pass(seconds=max(disk, layer.adam), busy={"disk": disk, "cpu": layer.adam})
        return Pass.serial(disk=disk, cpu=layer.adam)
