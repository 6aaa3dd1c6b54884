"""DeepSpeed ZeRO-Inference: stage 3 with parameters offloaded to host memory or NVMe, nothing kept on the GPU.

Sources: DeepSpeed's partitioned_param_coordinator.py and partitioned_param_swapper.py, its blog posts of 2022-09-10,
2024-08 and 2025-06. Every parameter is fetched before its module runs and released after. On several GPUs each fetches
its slice over its own link, then all-gathers over NVLink, or over the network, on the same stream. From NVMe a
parameter goes through pinned host buffers, or directly (GDS). The cache stays on the GPU. Attention is that of
transformers.

Constants:
* Copies reach 0.73 of what the link does: 10.1 GB/s on a V100 (60 GB of OPT-30B per step at batch 256 and 43
  tokens/s, row deepspeed-037) where Gen3 reaches 13.84 (row flexllmgen-053).
* Prefetching as of 2022 overlaps a third of the reads: from NVMe OPT-30B runs at 8.0 GB/s (row deepspeed-039), where
  reads of 25.6 GB/s and copies of 10.1 GB/s make 7.25 one after the other and 10.1 overlapped. The prefetcher then
  waited for each copy on the host before it asked for the next read.
* In DeepNVMe's measurements (2024 and later) reads run ahead of copies without such waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...memory.errors import DoesNotFitError
from ..hardware import Hardware
from ..modelshape import ModelShape
from ..schedule import Slots, TaskGraph
from ..work import Work
from .costs import Costs
from .prediction import Pass, Prediction, generated, repeated
from .system import Options, absurd, device, drives, only, options

COPIES = 0.73
OVERLAPPED_READS = 0.33
BUFFERS = 5
"""Pinned buffers for parameters (`buffer_count`)."""

Tier = Literal["gpu", "cpu", "nvme"]


class ZeroOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration file of DeepSpeed says."""

    tier: Tier = "cpu"
    """offload_param.device; gpu: partitioned over the GPUs' memory."""
    prefetch: bool = True
    """stage3_prefetch_bucket_size above 0."""
    io: Literal["aio", "gds"] = "aio"
    """How NVMe is read: through pinned host buffers, or straight into GPU memory."""
    revision: Literal["2022", "2024"] = "2024"
    """Whose prefetcher: that of the first release, or DeepNVMe's."""
    resident_parameters: float = 0.0
    """Parameters that stay on the GPU."""
    gpus: int = 0
    """How many take part; 0: all of the machine."""


@dataclass(frozen=True, kw_only=True)
class ZeroInference:
    """The policy."""

    name: str = "zero-inference"
    summary: str = "DeepSpeed ZeRO-Inference: all parameters fetched for every step, from host memory or NVMe"
    eager: bool = True
    """Attention is written as single operations."""

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        device(hardware, self.name)
        chosen = options(work, ZeroOptions, self.name)
        if chosen.tier == "nvme":
            drives(hardware, self.name)
        if chosen.gpus < 0 or not 0 <= chosen.resident_parameters <= model.parameters:
            raise absurd(self.name, "policy", work.policy, f"gpus from 0, resident_parameters to {model.parameters:g}")
        devices = chosen.gpus or hardware.gpus * hardware.machines
        costs = Costs(hardware=hardware, model=model)
        self._check(hardware, model, work, chosen, devices)
        fetch = Fetch(hardware=hardware, model=model, chosen=chosen, devices=devices)

        def step(queries: int, context: float) -> Pass:
            sequences = max(work.batch / devices, 1)
            compute = costs.layer(sequences, queries, context, eager=self.eager)
            layers = repeated(model.depth, lambda depth: fetch.layers(depth, compute))
            tables = fetch.tables(costs.head(sequences * queries))
            return Pass.chain((layers, tables))

        notes = [*model.notes, f"{devices} GPU(s), parameters in {chosen.tier}, prefetch {chosen.prefetch}"]
        middle = work.prompt + work.generate / 2
        return generated(self.name, work, step(work.prompt, work.prompt), step(1, middle), notes)

    def _check(self, hardware: Hardware, model: ModelShape, work: Work, chosen: ZeroOptions, devices: int) -> None:
        assert hardware.gpu is not None, "checked before"
        has = hardware.gpu.memory_nbytes
        kept = model.nbytes / devices if chosen.tier == "gpu" else chosen.resident_parameters * model.itemsize
        cache = max(work.batch / devices, 1) * (work.prompt + work.generate) * model.kv_nbytes * model.depth
        widest = 2 * model.layer_nbytes
        if kept + cache + widest > 1.05 * has:  # what is resident is a round figure
            raise DoesNotFitError(
                f"{kept / 1e9:.1f} GB of weights, {cache / 1e9:.1f} GB of cache and {widest / 1e9:.1f} GB for two "
                f"layers on each GPU; it has {has / 1e9:.1f} GB: use a smaller batch",
                tier="device",
                needed_nbytes=int(kept + cache + widest),
                available_nbytes=has,
            )
        room = hardware.host_nbytes * hardware.machines
        if chosen.tier == "cpu" and model.nbytes > room:
            raise DoesNotFitError(
                f"{model.nbytes / 1e9:.0f} GB of weights, and {room / 1e9:.0f} GB of host memory: "
                "write nvme as its tier",
                tier="host",
                needed_nbytes=model.nbytes,
                available_nbytes=room,
            )


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """How parameters come to the GPUs, as a graph of tasks."""

    hardware: Hardware
    model: ModelShape
    chosen: ZeroOptions
    devices: int

    def layers(self, depth: int, compute: float) -> TaskGraph:
        """A pass through layers that take so many seconds of computing each."""
        graph, buffers = TaskGraph(), Slots(BUFFERS)
        here = self._moved_share
        matrices = [here * each / self.model.depth for each in self._matrix_nbytes()]
        share = compute / len(matrices)
        copied = used = before = -1
        for _ in range(depth):
            for nbytes in matrices:
                # Without prefetching nothing is asked for before the module is called.
                gate = [each for each in (used if not self.chosen.prefetch else before,) if each >= 0]
                before = used
                copied = self._fetch(graph, nbytes, gate, copied, buffers)
                used = graph.add("compute", "gpu", share, after=[copied] if copied >= 0 else [])
        return graph

    def tables(self, compute: float) -> Pass:
        """Embedding and head: fetched whole, as everything is."""
        graph = TaskGraph()
        nbytes = self._moved_share * self.model.table_parameters * self.model.itemsize
        copied = self._fetch(graph, nbytes, [], -1, Slots(BUFFERS))
        graph.add("compute", "gpu", compute, after=[copied])
        schedule = graph.simulate()
        return Pass(seconds=schedule.makespan, busy=schedule.busy)

    @property
    def _moved_share(self) -> float:
        return 1 - self.chosen.resident_parameters / self.model.parameters

    def _matrix_nbytes(self) -> list[float]:
        """Of a layer's matrices, times the number of layers."""
        sizes: dict[str, float] = {}
        for layer in self.model.layers:
            for matrix in layer.matrices:
                name = f"{matrix.role}.{matrix.name}"
                sizes[name] = sizes.get(name, 0.0) + layer.count * matrix.parameters * self.model.itemsize
        return list(sizes.values())

    def _fetch(self, graph: TaskGraph, nbytes: float, gate: list[int], copied: int, buffers: Slots) -> int:
        """Read, copy and gather one parameter; returns the task after which it is there."""
        after = list(gate)
        if self.chosen.tier == "nvme":
            after = self._read(graph, nbytes, gate, copied, buffers)
        link = self.hardware.link
        assert link is not None, "checked before"
        slice_nbytes = nbytes / self.devices
        if self.chosen.tier == "cpu" or (self.chosen.tier == "nvme" and self.chosen.io == "aio"):
            last = graph.add("copy", "h2d", slice_nbytes / (COPIES * link.h2d.best), after=after)
        else:
            last = graph.add("there", after=after)
        if self.chosen.tier == "nvme":
            buffers.use(last)
        if self.devices > 1:
            # All-gathers are issued on the stream of the copies, and the next copy waits for them.
            last = graph.add("gather", "h2d", (nbytes - slice_nbytes) / self._gather_rate(link.peer), after=[last])
        return last

    def _read(self, graph: TaskGraph, nbytes: float, gate: list[int], copied: int, buffers: Slots) -> list[int]:
        direct = sum((d.read_direct or d.read).best for d in self.hardware.drives)
        rate = self.hardware.machines * (direct if self.chosen.io == "gds" else self.hardware.disk_read)
        seconds = nbytes / rate
        slot = list(buffers.take())
        if self.chosen.revision == "2024" and self.chosen.prefetch:
            return [graph.add("read", "disk", seconds, after=slot)]
        ahead = OVERLAPPED_READS if self.chosen.prefetch else 0.0
        early = graph.add("read ahead", "disk", ahead * seconds, after=slot + gate)
        wait = [each for each in (copied,) if each >= 0]
        return [graph.add("read", "disk", (1 - ahead) * seconds, after=[early, *wait])]

    def _gather_rate(self, peer: float) -> float:
        """Bytes per second that each GPU receives."""
        if self.devices > self.hardware.gpus and self.hardware.network:
            return self.hardware.network
        link = self.hardware.link
        assert link is not None, "checked before"
        return peer or link.h2d.best
