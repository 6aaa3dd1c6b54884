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
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
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
    if chosen.gpu_batch:
        pairs = [(chosen.gpu_batch, chosen.batches)]
    else:
        every = [(gpu_batch, batches) for gpu_batch in _GPU_BATCHES for batches in _BATCHES]
        pairs = [pair for pair in every if work.batch % (pair[0] * pair[1]) == 0]
    for gpu_batch, batches in pairs:
        for cache in ((100, 0), (0, 100), (0, 0)):
            for activations in ((100, 0), (0, 100)):
                block = Block(
                    hardware=hardware,
                    model=model,
                    percent=(0, 0, *cache, *activations),
                    gpu_batch=gpu_batch,
                    batches=batches,
                    chosen=chosen,
                )
                found = _largest(block, work)
                if found is not None:
                    yield found
                    if cache[0] < 100 and not chosen.compress_cache:
                        yield replace(found, chosen=msgspec.structs.replace(chosen, cpu_attention=True))


def _largest(block: Block, work: Work) -> Block | None:
    """The block with most of the weights high up, or None where it does not fit at all."""
    _, _, cache_gpu, cache_cpu, hidden_gpu, hidden_cpu = block.percent
    for on_gpu in range(100, -1, -_STEP):
        for on_cpu in range(100 - on_gpu, -1, -_STEP):
            if on_gpu + on_cpu < 100 and not block.hardware.drives:
                break
            tried = replace(block, percent=(on_gpu, on_cpu, cache_gpu, cache_cpu, hidden_gpu, hidden_cpu))
            if fits(tried, work):
                return tried
    return None


def fits(block: Block, work: Work) -> bool:
    """Whether all tiers hold their part, at the end of prefill (the paper's appendix A)."""
    hardware, model, gpu_batch = block.hardware, block.model, block.gpu_batch
    assert hardware.gpu is not None, "checked before"
    sequences = gpu_batch * block.batches
    packed = PACKED if block.chosen.compress_weight else 1
    weights = model.layer_parameters * model.itemsize * packed / block.stages
    cache = sequences * (work.prompt + work.generate) * model.kv_nbytes * model.depth / block.stages
    cache *= PACKED if block.chosen.compress_cache else 1
    hidden = sequences * work.prompt * model.hidden * 2
    shares = [each / 100 for each in block.percent]
    one = gpu_batch * work.prompt
    working = 2 * (1 - shares[0]) * model.layer_nbytes + model.table_parameters * model.itemsize
    scores = 2 * gpu_batch * model.heads * work.prompt**2
    working += max(8 * one * model.hidden, 4 * one * model.hidden + scores, 2 * one * (model.hidden + model.ffn))
    on_gpu = shares[0] * weights + shares[2] * cache + shares[4] * hidden + working
    on_cpu = shares[1] * weights + shares[3] * cache + shares[5] * hidden + (1 - shares[0]) * model.layer_nbytes
    on_disk = block.disk_share(0) * weights + block.disk_share(2) * cache
    room = sum(drive.capacity_nbytes for drive in hardware.drives)
    disk_fits = on_disk < 1 or (bool(hardware.drives) and (not room or on_disk < room))
    return on_gpu < _USED * hardware.gpu.memory_nbytes and on_cpu < _USED * hardware.host_nbytes and disk_fits
