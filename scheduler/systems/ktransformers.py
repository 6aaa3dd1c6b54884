"""KTransformers: attention, dense layers and shared experts on the GPU, routed experts on the CPU.

Sources: kt-kernel and its paper (SOSP 2025). The GPU submits the routed experts to the CPU and goes on with the shared
ones; then it waits. Some routed experts may be on the GPU (a fixed mask); the CPU skips these. Long prompts can instead
pass through the GPU layer by layer. Expert weights may be quantised; the CPU reads them as they are. Expert deferral,
which changes results, is not modelled.
"""

from __future__ import annotations

from ...memory.errors import DoesNotFitError, UsageError
from ..hardware import Hardware
from ..modelshape import ModelShape
from ..work import Work
from .costs import Costs
from .fiddler import expert_operation, experts
from .prediction import Pass, Prediction, generated
from .system import Options, absurd, device, only, options


class KTransformersOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of its command line."""

    expert_bits: float = 0.0
    """Bits per expert weight on the CPU; 0: those of the model."""
    gpu_experts: int = 0
    """Routed experts of each layer on the GPU."""
    layerwise_prefill: bool = False
    """Prompts pass through the GPU, whose weights are copied for them."""


class KTransformers:
    """The policy."""

    name = "ktransformers"
    summary = "KTransformers: routed experts on the CPU, the rest on the GPU at the same time"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        device(hardware, self.name)
        if not model.has_experts:
            raise UsageError(
                f"{self.name} is for mixtures of experts, and {model.name} has none: choose another system"
            )
        chosen = options(work, KTransformersOptions, self.name)
        if chosen.expert_bits and not 1 <= chosen.expert_bits <= 32:
            raise absurd(self.name, "expert_bits", chosen.expert_bits, "1 to 32, or 0")
        bits = chosen.expert_bits or 8 * model.itemsize
        held = sum(each.parameters * layer.count for layer in model.layers for each in experts(layer))
        if held * bits / 8 > hardware.host_nbytes:
            raise DoesNotFitError(
                f"{held * bits / 8e9:.0f} GB of experts in {hardware.host_nbytes / 1e9:.0f} GB of host memory: "
                "use fewer expert_bits",
                tier="host",
                needed_nbytes=int(held * bits / 8),
                available_nbytes=hardware.host_nbytes,
            )
        costs = Costs(hardware=hardware, model=model)

        def step(queries: int, context: float) -> Pass:
            parts = [
                self._layer(costs, place, work.batch, queries, context, bits, chosen).times(layer.count)
                for place, layer in enumerate(model.layers)
            ]
            return Pass.chain((*parts, Pass.serial(gpu=costs.head(work.batch))))

        notes = [*model.notes, f"experts at {bits:g} bits in host memory"]
        middle = work.prompt + work.generate / 2
        return generated(self.name, work, step(work.prompt, work.prompt), step(1, middle), notes)

    def _layer(
        self,
        costs: Costs,
        place: int,
        batch: int,
        queries: int,
        context: float,
        bits: float,
        chosen: KTransformersOptions,
    ) -> Pass:
        layer, tokens = costs.model.layers[place], batch * queries
        before = costs.seconds(
            [
                *costs.products(layer, tokens, ("attention", "router")),
                *costs.attention(batch, queries, context, eager=False),
                costs.model.elementwise(tokens),
            ]
        )
        shared = costs.seconds(costs.products(layer, tokens, ("ffn",)))
        matrices = experts(layer)
        if not matrices:
            return Pass.serial(gpu=before + shared)
        needed = matrices[0].touched(tokens)
        here = min(chosen.gpu_experts / matrices[0].copies, 1.0)
        rows = max(tokens * matrices[0].used / needed, 1)
        one = [expert_operation(costs.model, matrix, rows) for matrix in matrices]
        on_gpu = costs.seconds(one)
        if chosen.layerwise_prefill and queries > 1:
            copied = matrices[0].copies * (1 - here) * sum(each.nbytes for each in one) / costs.pinned_rate()
            gpu = before + shared + needed * on_gpu
            return Pass(seconds=max(copied, gpu), busy={"h2d": copied, "gpu": gpu})
        cpu = needed * (1 - here) * self._on_cpu(costs, sum(each.nbytes for each in one), rows, bits)
        gpu = shared + needed * here * on_gpu
        return Pass(seconds=before + max(cpu, gpu), busy={"gpu": before + gpu, "cpu": cpu})

    def _on_cpu(self, costs: Costs, nbytes: float, rows: float, bits: float) -> float:
        """One expert: read as it is stored, multiplied in the dtype that the CPU is fastest at."""
        stored = nbytes / costs.model.itemsize * bits / 8
        read = stored / costs.cost.memory_rate("cpu")
        # At many rows arithmetic binds, whatever the weights were stored as.
        multiplied = nbytes / costs.hardware.cpu.linear_rate(costs.model.dtype, rows)
        return max(read, multiplied) if rows > 1 else read
