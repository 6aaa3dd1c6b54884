"""MoE-Lightning: batch inference of mixtures of experts; CGOPipe: weights in pages between micro-batches.

Source: its paper (arXiv 2411.11217, ASPLOS 2025). Weights are in host memory; a share may stay on the GPU. They are cut
into as many pages as there are micro-batches, and a page of the next layer is copied between the hidden states of two
micro-batches, so that neither waits for the other. At decode attention runs on the CPU, two micro-batches ahead: QKV on
the GPU, queries, keys and values down, attention on the CPU, its result up, projection and experts on the GPU. A prompt
is attended on the GPU, and its cache goes down. The paper's planner picks the batch; here it is the workload's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...memory.errors import DoesNotFitError
from ..hardware import Hardware
from ..modelshape import Layer, ModelShape
from ..operations import Operation
from ..schedule import TaskGraph
from ..work import Work
from .costs import Costs
from .prediction import Prediction, generated, repeated
from .system import Options, absurd, device, only, options

AHEAD = 2


class MoeLightningOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What its planner chooses."""

    micro_batch: int = 0
    """Sequences; 0: a sixteenth of the batch, one at least."""
    weights_on_gpu: float = 0.0
    """Share of the weights that stays on the GPU."""
    cpu_attention: bool = True


class MoeLightning:
    """The policy."""

    name = "moe-lightning"
    summary = "MoE-Lightning: paged weights between micro-batches, CPU attention two micro-batches ahead"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        device(hardware, self.name)
        chosen = options(work, MoeLightningOptions, self.name)
        if chosen.micro_batch < 0 or not 0 <= chosen.weights_on_gpu <= 1:
            raise absurd(self.name, "policy", work.policy, "micro_batch from 0, weights_on_gpu from 0 to 1")
        self._check(hardware, model, work)
        costs = Costs(hardware=hardware, model=model)
        micro = chosen.micro_batch or max(work.batch // 16, 1)
        micro_batches = [min(micro, work.batch - start) for start in range(0, work.batch, micro)]
        prefill = repeated(
            model.depth, lambda depth: self._graph(costs, chosen, depth, micro_batches, work.prompt, work.prompt)
        )
        middle = work.prompt + work.generate / 2
        decode = repeated(model.depth, lambda depth: self._graph(costs, chosen, depth, micro_batches, 1, middle))
        notes = [*model.notes, f"{len(micro_batches)} micro-batches of {micro}"]
        return generated(self.name, work, prefill, decode, notes)

    def _check(self, hardware: Hardware, model: ModelShape, work: Work) -> None:
        cache = work.batch * (work.prompt + work.generate) * model.kv_nbytes * model.depth
        if model.nbytes + cache > hardware.host_nbytes:
            raise DoesNotFitError(
                f"{model.nbytes / 1e9:.0f} GB of weights and {cache / 1e9:.0f} GB of cache in "
                f"{hardware.host_nbytes / 1e9:.0f} GB of host memory: use a smaller batch",
                tier="host",
                needed_nbytes=int(model.nbytes + cache),
                available_nbytes=hardware.host_nbytes,
            )

    def _graph(
        self,
        costs: Costs,
        chosen: MoeLightningOptions,
        depth: int,
        micro_batches: Sequence[int],
        queries: int,
        context: float,
    ) -> TaskGraph:
        """Weights of a layer are there when all their pages are; a page waits for the layer before the last to end."""
        graph, model = TaskGraph(), costs.model
        count = len(micro_batches)
        page = (1 - chosen.weights_on_gpu) * model.layer_nbytes / count / costs.pinned_rate()
        attends_on_cpu = chosen.cpu_attention and queries == 1
        weights = [graph.add("page", "h2d", page) for _ in micro_batches]
        ended: list[int] = []
        free: list[int] = []
        for _ in range(depth):
            waiting: list[tuple[int, int]] = []
            coming: list[int] = []
            this_layer: list[int] = []
            for place in range(count + AHEAD):
                if place < count:
                    after = [*weights, *ended[place : place + 1]]
                    waiting.append((place, self._before(graph, costs, micro_batches[place], queries, context, after)))
                if place >= AHEAD and waiting:
                    done, ready = waiting.pop(0)
                    batch = micro_batches[done]
                    attended = self._attend(graph, costs, batch, context, ready) if attends_on_cpu else ready
                    coming.append(graph.add("page", "h2d", page, after=free))
                    this_layer.append(self._after(graph, costs, batch, queries, attended))
            weights, ended, free = coming, this_layer, this_layer[-1:]
        return graph

    def _before(
        self, graph: TaskGraph, costs: Costs, batch: int, queries: int, context: float, after: Sequence[int]
    ) -> int:
        """Queries, keys and values; of a prompt attention too, whose cache then goes down."""
        projections = costs.mean(lambda layer: costs.products(layer, batch * queries, ("attention",))[:-1])
        if queries == 1:
            return graph.add("qkv", "gpu", projections, after=after)
        attention = costs.seconds(costs.attention(batch, queries, context, eager=False))
        last = graph.add("qkv and attention", "gpu", projections + attention, after=after)
        graph.add("store cache", "d2h", batch * queries * costs.model.kv_nbytes / costs.back_rate(), after=[last])
        return last

    def _attend(self, graph: TaskGraph, costs: Costs, batch: int, context: float, after: int) -> int:
        model = costs.model
        width = model.hidden * max(model.itemsize, 2)
        down = graph.add("qkv", "d2h", batch * (width + model.kv_nbytes) / costs.back_rate(), after=[after])
        attended = graph.add(
            "attention", "cpu", costs.seconds([model.attention(batch, 1, context)], "cpu"), after=[down]
        )
        return graph.add("hidden", "h2d", batch * width / costs.pinned_rate(), after=[attended])

    def _after(self, graph: TaskGraph, costs: Costs, batch: int, queries: int, after: int) -> int:
        tokens = batch * queries
        rest = [costs.model.elementwise(tokens)]

        def operations(layer: Layer) -> list[Operation]:
            output = costs.products(layer, tokens, ("attention",))[-1:]
            return [*output, *costs.products(layer, tokens, ("ffn", "expert", "router")), *rest]

        return graph.add("output and experts", "gpu", costs.mean(operations), after=[after])
