"""FlexGen: layers outside, micro-batches inside (zig-zag); weights, cache, activations in percentages on three tiers.

Sources: FlexGen's paper (arXiv 2303.06865) and code (flex_opt.py, dist_flex_opt.py, pytorch_backend.py,
compression.py). Attention and feed-forward are layers of their own. While one computes, the next one's weights come,
once per layer, and the next micro-batch's cache; after every (layer, micro-batch) everything is waited for. So the
weights have the time of the first micro-batch only. What is not pinned is copied into pinned memory by the main thread
first, which launches nothing meanwhile. The cache on the CPU is never pinned. On several machines layers are stages
of a pipeline, and each stage loads its weights anew for every batch that passes.

Constants:
* Attention on the CPU converts the cache to float32: it reads 2 bytes, writes 4 and reads 4 per element, five passes
  over fp16. (On the authors' machine that is 12.8 GB/s; their fit is 12.3, row flexllmgen-063.)
* To the CPU, caches go at 0.97 GiB/s and hidden states at 4.82 GiB/s (rows flexllmgen-054, -055).
* 4 bits in groups of 64, with scale and minimum in fp16, are 0.5625 bytes per element. Taken apart by seven PyTorch
  operations they move 15 bytes per element in GPU memory, put together 25 (counted in compression.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..hardware import Hardware
from ..modelshape import ModelShape, Role
from ..operations import Operation
from ..schedule import TaskGraph
from .costs import GIB, Costs, role_share
from .prediction import Pass, repeated
from .system import Options

CPU_ATTENTION_PASSES = 5
CACHE_TO_CPU = 0.97 * GIB
HIDDEN_TO_CPU = 4.82 * GIB
PACKED = 0.5625 / 2
"""Bytes of a compressed tensor over those in fp16."""
UNPACK = 15 / 2
PACK = 25 / 2
"""Bytes moved in GPU memory over those of the tensor in fp16."""

_FEED_FORWARD: tuple[Role, ...] = ("ffn", "expert", "router")


class FlexGenOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FlexGen's command line. Without `percent` a policy is searched for, of blocks that divide the batch."""

    percent: tuple[float, float, float, float, float, float] | None = None
    """Weights on GPU and CPU, cache on GPU and CPU, activations on GPU and CPU; what is left is on disk."""
    gpu_batch: int = 0
    """Sequences per micro-batch; 0: the whole batch."""
    batches: int = 1
    """Micro-batches."""
    cpu_attention: bool = False
    compress_weight: bool = False
    compress_cache: bool = False
    pin_weight: bool = True
    gpus: int = 0
    """How many take part, as stages of a pipeline; 0: all of the machine, and of all machines."""
    inner: int = 0
    """Batches in the pipeline; 0: as many as there are stages."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A policy, and what it costs per layer and micro-batch."""

    hardware: Hardware
    model: ModelShape
    percent: tuple[float, float, float, float, float, float]
    gpu_batch: int
    batches: int
    chosen: FlexGenOptions

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.chosen.gpus or self.hardware.machines * self.hardware.gpus

    @cached_property
    def costs(self) -> Costs:
        """Of parts of a layer."""
        return Costs(hardware=self.hardware, model=self.model)

    def disk_share(self, first: int) -> float:
        """What the percentages leave for the disk: of weights (0), cache (2), activations (4)."""
        return max(0.0, 1 - (self.percent[first] + self.percent[first + 1]) / 100)

    def forward(self, depth: int, queries: int, context: float) -> Pass:
        """A pass of the whole block of micro-batches through so many layers."""
        return repeated(depth, lambda layers: self._graph(layers, queries, context))

    def _graph(self, depth: int, queries: int, context: float) -> TaskGraph:
        graph, barrier = TaskGraph(), -1
        for _ in range(depth):
            for half in ("attention", "ffn"):
                for batch in range(self.batches):
                    issued = graph.barrier([barrier] if barrier >= 0 else [])
                    gate = [issued]
                    if batch == 0:  # the weights of the half after this one
                        gate.append(self._load_weight(graph, "ffn" if half == "attention" else "attention", issued))
                    next_half = half if batch + 1 < self.batches else ("ffn" if half == "attention" else "attention")
                    if next_half == "attention" and queries == 1:
                        gate.append(self._load_cache(graph, context, issued))
                    self._hidden(graph, queries, issued)
                    self._compute(graph, half, queries, context, gate)
                    if half == "attention":
                        self._store_cache(graph, queries, issued)
                    barrier = graph.barrier(range(issued, graph.count))
        return graph

    def _load_weight(self, graph: TaskGraph, half: str, after: int) -> int:
        """Copies of the weights of half a layer; returns what the main thread is kept by."""
        attention = role_share(self.model, "attention")
        nbytes = self.model.layer_nbytes * (attention if half == "attention" else 1 - attention)
        nbytes *= PACKED if self.chosen.compress_weight else 1
        on_cpu, on_disk = self.percent[1] / 100 * nbytes, self.disk_share(0) * nbytes
        if on_disk:
            read = graph.add("read weights", "disk", on_disk / self.costs.disk_rate(), after=[after])
            graph.add("copy weights", "h2d", on_disk / self.costs.pinned_rate(), after=[read])
        return self._to_gpu(graph, "weights", on_cpu, after, pinned=self.chosen.pin_weight)

    def _load_cache(self, graph: TaskGraph, context: float, after: int) -> int:
        nbytes = self._cache_nbytes(context)
        on_cpu, on_disk = self.percent[3] / 100 * nbytes, self.disk_share(2) * nbytes
        if on_disk:
            read = graph.add("read cache", "disk", on_disk / self.costs.disk_rate(), after=[after])
            if not self._attends_on_cpu:
                graph.add("copy cache", "h2d", on_disk / self.costs.pinned_rate(), after=[read])
        if self._attends_on_cpu:
            return after
        return self._to_gpu(graph, "cache", on_cpu, after, pinned=False)

    def _to_gpu(self, graph: TaskGraph, what: str, nbytes: float, after: int, *, pinned: bool) -> int:
        if not nbytes:
            return after
        if pinned:
            graph.add(f"copy {what}", "h2d", nbytes / self.costs.pinned_rate(), after=[after])
            return after
        return graph.add(f"relay {what}", "host", nbytes / self.costs.pageable_rate(), after=[after])

    def _hidden(self, graph: TaskGraph, queries: int, after: int) -> None:
        away = (100 - self.percent[4]) / 100
        nbytes = away * self.gpu_batch * queries * self.model.hidden * max(self.model.itemsize, 2)
        if nbytes:
            graph.add("load hidden", "h2d", nbytes / self.costs.pinned_rate(), after=[after])
            graph.add("store hidden", "d2h", nbytes / min(HIDDEN_TO_CPU, self.costs.back_rate()), after=[after])

    def _store_cache(self, graph: TaskGraph, queries: int, after: int) -> None:
        nbytes = self.gpu_batch * queries * self.model.kv_nbytes * (PACKED if self.chosen.compress_cache else 1)
        away = (100 - self.percent[2]) / 100 * nbytes
        if away:
            store = graph.add("store cache", "d2h", away / min(CACHE_TO_CPU, self.costs.back_rate()), after=[after])
            if on_disk := self.disk_share(2) * nbytes:
                graph.add("write cache", "disk", on_disk / self.hardware.disk_write, after=[store])

    def _compute(self, graph: TaskGraph, half: str, queries: int, context: float, after: list[int]) -> int:
        tokens = self.gpu_batch * queries
        if half == "ffn":
            rest = [self.model.elementwise(tokens), *self._unpacking(half, queries, context)]
            seconds = self.costs.mean(lambda layer: [*self.costs.products(layer, tokens, _FEED_FORWARD), *rest])
            return graph.add("ffn", "gpu", seconds, after=after)
        unpacking = self._unpacking(half, queries, context)
        seconds = self.costs.mean(lambda layer: [*self.costs.products(layer, tokens, ("attention",)), *unpacking])
        last = graph.add("projections", "gpu", seconds, after=after)
        here = float(self.gpu_batch)
        if queries == 1 and self._attends_on_cpu:
            away = (100 - self.percent[2]) / 100
            nbytes = CPU_ATTENTION_PASSES * away * self.model.attention(self.gpu_batch, 1, context).nbytes
            cpu = self.costs.seconds([Operation(kind="memory", nbytes=nbytes)], "cpu")
            graph.add("attention", "cpu", cpu, after=[last])
            here *= 1 - away
        seconds = self.costs.seconds(self.costs.attention(here, queries, context)) if here else 0.0
        return graph.add("attention", "gpu", seconds, after=[last])

    def _unpacking(self, half: str, queries: int, context: float) -> list[Operation]:
        """Compressed weights are unpacked for every micro-batch, the cache for every step."""
        moved = 0.0
        if self.chosen.compress_weight:
            attention = role_share(self.model, "attention")
            moved += UNPACK * self.model.layer_nbytes * (attention if half == "attention" else 1 - attention)
        if self.chosen.compress_cache and half == "attention":
            nbytes = self.model.attention(self.gpu_batch, queries, context).nbytes
            moved += UNPACK * nbytes if queries == 1 else PACK * nbytes
        return [Operation(kind="memory", nbytes=moved, launches=7)] if moved else []

    def _cache_nbytes(self, context: float) -> float:
        nbytes = self.model.attention(self.gpu_batch, 1, context).nbytes
        return nbytes * (PACKED if self.chosen.compress_cache else 1)

    @property
    def _attends_on_cpu(self) -> bool:
        return self.chosen.cpu_attention and not self.chosen.compress_cache and self.percent[2] < 100
