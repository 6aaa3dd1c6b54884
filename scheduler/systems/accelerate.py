"""Hugging Face accelerate with a device map: every module's weights are fetched when it is called, and dropped after.

Source: accelerate/hooks.py and big_modeling.py. A hook before each module copies its tensors one by one, from pageable
memory and synchronously; nothing is prefetched and nothing overlaps. What is on disk is mapped, so that a copy first
waits for the pages to be read. Layers are placed in order: GPU, then CPU, then disk. Embedding and head stay on the
GPU. All layers compute on the GPU. Hidden states and the cache stay there too.
"""

from __future__ import annotations

from typing import Literal

from ...memory.errors import DoesNotFitError
from ..hardware import Hardware
from ..modelshape import ModelShape
from ..work import Work
from .costs import Costs
from .prediction import Pass, Prediction, generated
from .system import Options, device, drives, only, options


class AccelerateOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where layers lie."""

    device_map: Literal["auto", "gpu", "cpu", "disk"] = "auto"
    """auto: in order, as much as fits. Otherwise all of them in one place."""
    gpu_gb: float | None = None
    """max_memory of the GPU; default what the cache of this workload leaves."""
    cpu_gb: float | None = None
    """max_memory of the CPU; default 0.9 of it."""
    experts: Literal["apart", "merged"] = "apart"
    """Whether each expert is a module, fetched when a token chose it, or all of a layer are one tensor, as they are
    since transformers 5."""


class Accelerate:
    """The policy."""

    name = "accelerate"
    summary = "Hugging Face accelerate with a device map: synchronous copies per module, no overlap"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        device(hardware, self.name)
        chosen = options(work, AccelerateOptions, self.name)
        costs = Costs(hardware=hardware, model=model)
        on_gpu, on_cpu, on_disk = self._placed(hardware, model, work, chosen)
        if on_disk:
            drives(hardware, self.name)

        def step(queries: int, context: float) -> Pass:
            nbytes = model.layer_nbytes
            if chosen.experts == "apart":
                nbytes -= self._unused(model, work.batch * queries)
            return Pass.serial(
                disk=on_disk * nbytes / costs.disk_rate() if on_disk else 0.0,
                h2d=(on_cpu + on_disk) * nbytes / costs.pageable_rate(),
                gpu=model.depth * costs.layer(work.batch, queries, context) + costs.head(work.batch * queries),
            )

        middle = work.prompt + work.generate / 2
        notes = [*model.notes, f"layers: {on_gpu} on the GPU, {on_cpu} in host memory, {on_disk} on disk"]
        return generated(self.name, work, step(work.prompt, work.prompt), step(1, middle), notes)

    def _unused(self, model: ModelShape, tokens: int) -> float:
        """Bytes of experts that no token chose, per layer."""
        unused = sum(
            layer.count * matrix.parameters * (1 - matrix.touched(tokens) / matrix.copies)
            for layer in model.layers
            for matrix in layer.matrices
        )
        return unused * model.itemsize / model.depth

    def _placed(
        self, hardware: Hardware, model: ModelShape, work: Work, chosen: AccelerateOptions
    ) -> tuple[int, int, int]:
        """How many layers lie where."""
        depth, each = model.depth, model.layer_nbytes
        assert hardware.gpu is not None, "checked before"
        has = hardware.gpu.memory_nbytes * hardware.gpus
        cache = work.batch * work.context * model.kv_nbytes * depth
        rest = model.table_parameters * model.itemsize + cache + each  # one layer more is fetched into
        needed = rest + (depth * each if chosen.device_map == "gpu" else 0)
        if needed > has:
            raise DoesNotFitError(
                f"what has to be on the GPU, and the cache of {work.batch} sequences, take {needed / 1e9:.1f} GB; "
                f"it has {has / 1e9:.1f} GB: use a smaller batch, or auto as device_map",
                tier="device",
                needed_nbytes=int(needed),
                available_nbytes=has,
            )
        host = 0.9 * hardware.host_nbytes if chosen.cpu_gb is None else chosen.cpu_gb * 1e9
        if chosen.device_map == "auto":
            on_gpu = min(depth, int((has - rest if chosen.gpu_gb is None else chosen.gpu_gb * 1e9) / each))
            on_cpu = min(depth - on_gpu, int(host / each))
        else:
            on_gpu = depth if chosen.device_map == "gpu" else 0
            on_cpu = depth if chosen.device_map == "cpu" else 0
        if on_cpu * each > host:
            raise DoesNotFitError(
                f"{on_cpu * each / 1e9:.0f} GB of layers in {host / 1e9:.0f} GB of host memory: write auto or disk as "
                "device_map",
                tier="host",
                needed_nbytes=int(on_cpu * each),
                available_nbytes=hardware.host_nbytes,
            )
        return on_gpu, on_cpu, depth - on_gpu - on_cpu
