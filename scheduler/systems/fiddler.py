"""Fiddler: experts of a mixture partly on the GPU; for the others, weights go to the GPU or activations to the CPU.

Sources: its paper (arXiv 2402.07033) and code (src/fiddler/mixtral.py). Attention and some experts, chosen by
popularity once and for all, are on the GPU. Each needed expert that is not there is computed on the CPU or copied,
whichever its constants say is shorter; copies are synchronous and from pageable memory, and GPU and CPU experts run
one after the other. Experts are taken to be equally popular here: a list of popularities is a property of data.
"""

from __future__ import annotations

from ...memory.errors import UsageError
from ..hardware import Hardware
from ..modelshape import Layer, Matrix, ModelShape
from ..operations import Operation
from ..work import Work
from .costs import Costs
from .prediction import Pass, Prediction, generated
from .system import Options, absurd, device, only, options


class FiddlerOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its one choice."""

    gpu_experts: int = -1
    """Experts that are on the GPU, of all layers together; -1: as many as fit."""


class Fiddler:
    """The policy."""

    name = "fiddler"
    summary = "Fiddler: experts on the GPU by popularity, misses on the CPU or copied, one after the other"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        gpu, _ = device(hardware, self.name)
        if not model.has_experts:
            raise UsageError(
                f"{self.name} is for mixtures of experts, and {model.name} has none: choose another system"
            )
        chosen = options(work, FiddlerOptions, self.name)
        costs = Costs(hardware=hardware, model=model)
        total = sum(layer.count * experts(layer)[0].copies for layer in model.layers if experts(layer))
        held = sum(each.parameters for layer in model.layers for each in experts(layer) for _ in range(layer.count))
        cache = work.batch * work.context * model.kv_nbytes * model.depth
        room = gpu.memory_nbytes - (model.parameters - held) * model.itemsize - cache
        fits = int(max(room, 0) // (held / total * model.itemsize))
        wanted = min(fits, total) if chosen.gpu_experts < 0 else chosen.gpu_experts
        if wanted > total:
            raise absurd(self.name, "gpu_experts", wanted, f"at most {total}")
        hit = wanted / total

        def step(queries: int, context: float) -> Pass:
            parts = Pass.chain(
                self._layer(costs, layer, work.batch * queries, hit).times(layer.count) for layer in model.layers
            )
            rest = [*costs.attention(work.batch, queries, context), model.elementwise(work.batch * queries)]
            head = costs.head(work.batch * queries)
            return Pass.chain((parts, Pass.serial(gpu=model.depth * costs.seconds(rest) + head)))

        notes = [*model.notes, f"{wanted} of {total} experts on the GPU, taken to be equally popular"]
        middle = work.prompt + work.generate / 2
        return generated(self.name, work, step(work.prompt, work.prompt), step(1, middle), notes)

    def _layer(self, costs: Costs, layer: Layer, tokens: int, hit: float) -> Pass:
        """The products of a layer."""
        dense = costs.products(layer, tokens, ("attention", "ffn", "router"))
        matrices = experts(layer)
        if not matrices:
            return Pass.serial(gpu=costs.seconds(dense))
        needed = matrices[0].touched(tokens)
        rows = max(tokens * matrices[0].used / needed, 1)
        one = [expert_operation(costs.model, matrix, rows) for matrix in matrices]
        nbytes = sum(operation.nbytes for operation in one)
        on_gpu, copied = costs.seconds(one), nbytes / costs.pageable_rate()
        on_cpu = costs.seconds(one, "cpu")
        gpu = costs.seconds(dense) + needed * hit * on_gpu
        missed = needed * (1 - hit)
        if on_cpu < copied + on_gpu:
            return Pass.serial(gpu=gpu, cpu=missed * on_cpu)
        return Pass.serial(gpu=gpu + missed * on_gpu, h2d=missed * copied)


def experts(layer: Layer) -> list[Matrix]:
    """The matrices of a layer of which there are many."""
    return [matrix for matrix in layer.matrices if matrix.role == "expert"]


def expert_operation(model: ModelShape, matrix: Matrix, rows: float) -> Operation:
    """The product of one copy of such a matrix with so many tokens."""
    nbytes = matrix.inputs * matrix.outputs * model.itemsize
    return Operation(kind="linear", nbytes=nbytes, rows=rows, dtype=model.dtype)
