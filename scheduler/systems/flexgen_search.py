"""The policy search of FlexGen: what fits in memory by its own formulas, and of that what is fastest.

The paper solves a linear program for each pair of batch sizes. Here the percentages are tried in steps: the largest
share of the weights that fits the GPU, then the CPU; the cache and the activations as wholes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from ...memory.errors import DoesNotFitError
from ..hardware import Hardware
from ..modelshape import ModelShape
from ..work import Work
from .flexgen_block import PACKED, Block, FlexGenOptions

_GPU_BATCHES = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
_STEP = 10
_USED = 0.9
"""Of each memory; the rest is the framework's."""


def search(hardware: Hardware, model: ModelShape, work: Work, chosen: FlexGenOptions) -> Block:
    """The fastest block that fits.

    Raises:
        DoesNotFitError: none fits, not even from disk.
    """
    best, fastest = None, float("inf")
    for block in _candidates(hardware, model, work, chosen):
        middle = work.prompt + work.generate / 2
        # Two layers are enough to compare: a schedule of equal layers is periodic.
        prefill = block.forward(2, work.prompt, work.prompt).seconds
        decode = block.forward(2, 1, middle).seconds
        each = (prefill + (work.generate - 1) * decode) / (block.gpu_batch * block.batches)
        if each < fastest:
            best, fastest = block, each
    if best is None:
        raise DoesNotFitError(
            f"no policy of FlexGen fits {model.nbytes / 1e9:.0f} GB of weights on {hardware.name}: add disk or memory",
            tier="host",
            needed_nbytes=model.nbytes,
            available_nbytes=hardware.host_nbytes,
        )
    return best


def _candidates(hardware: Hardware, model: ModelShape, work: Work, chosen: FlexGenOptions) -> Iterator[Block]:
    for gpu_batch in _GPU_BATCHES:
        for batches in (1, 2, 3, 4, 6, 8, 12, 16):
            if gpu_batch * batches > work.batch or work.batch % (gpu_batch * batches):
                continue
            for cache in ((100, 0), (0, 100), (0, 0)):
                for activations in ((100, 0), (0, 100)):
                    found = _largest(hardware, model, work, chosen, gpu_batch, batches, (*cache, *activations))
                    if found is not None:
                        yield found
                        if cache[0] < 100 and not chosen.compress_cache:
                            yield replace(found, chosen=msgspec.structs.replace(chosen, cpu_attention=True))


def _largest(
    hardware: Hardware,
    model: ModelShape,
    work: Work,
    chosen: FlexGenOptions,
    gpu_batch: int,
    batches: int,
    rest: tuple[int, int, int, int],
) -> Block | None:
    """The block with most of the weights high up, or None where it does not fit at all."""
    for on_gpu in range(100, -1, -_STEP):
        for on_cpu in range(100 - on_gpu, -1, -_STEP):
            percent = (on_gpu, on_cpu, *rest)
            if on_gpu + on_cpu < 100 and not hardware.drives:
                break
            if _fits(hardware, model, work, chosen, gpu_batch, batches, percent):
                return Block(
                    hardware=hardware,
                    model=model,
                    percent=percent,
                    gpu_batch=gpu_batch,
                    batches=batches,
                    chosen=chosen,
                )
    return None


def _fits(
    hardware: Hardware,
    model: ModelShape,
    work: Work,
    chosen: FlexGenOptions,
    gpu_batch: int,
    batches: int,
    percent: tuple[float, ...],
) -> bool:
    """Whether all tiers hold their part, at the end of prefill (the paper's appendix A)."""
    assert hardware.gpu is not None, "checked before"
    stages = hardware.machines * hardware.gpus
    block = gpu_batch * batches
    weights = model.layer_parameters * model.itemsize * (PACKED if chosen.compress_weight else 1) / stages
    cache = block * (work.prompt + work.generate) * model.kv_nbytes * model.depth / stages
    cache *= PACKED if chosen.compress_cache else 1
    hidden = block * work.prompt * model.hidden * 2
    shares = [each / 100 for each in percent]
    one = gpu_batch * work.prompt
    working = 2 * (1 - shares[0]) * model.layer_nbytes + model.table_parameters * model.itemsize
    scores = 2 * gpu_batch * model.heads * work.prompt**2
    working += max(8 * one * model.hidden, 4 * one * model.hidden + scores, 2 * one * (model.hidden + model.ffn))
    on_gpu = shares[0] * weights + shares[2] * cache + shares[4] * hidden + working
    on_cpu = shares[1] * weights + shares[3] * cache + shares[5] * hidden + (1 - shares[0]) * model.layer_nbytes
    on_disk = (1 - shares[0] - shares[1]) * weights + (1 - shares[2] - shares[3]) * cache
    room = sum(drive.capacity_nbytes for drive in hardware.drives)
    disk_fits = on_disk < 1 or (bool(hardware.drives) and (not room or on_disk < room))
    return on_gpu < _USED * hardware.gpu.memory_nbytes and on_cpu < _USED * hardware.host_nbytes and disk_fits
