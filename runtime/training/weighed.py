"""What is known of a step before anything is loaded, to weigh room for activations against room for weights.

Of what a layer saves, results of its products are what is dear: each number of them is a sum of as many as a matrix has
inputs. They are those that were counted; where a forward could not be, they are read off the layers' matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from ...memory.requests import CHUNK
from ...scheduler.cost import CostModel
from ...scheduler.hardware import Hardware
from ...scheduler.operations import Operation
from ...scheduler.updatework import update_s
from ...scheduler.weighing import Dear, Part, Weighing
from ..activations.records import FORWARDS
from ..recompute import segments_of
from .loads import update_work
from .optimizers import OptimizerChoice
from .preparing import arrays_of
from .saves import ForwardSaves, Product


def weighing(
    model: nn.Module,
    saves: ForwardSaves | None,
    hardware: Hardware,
    choice: OptimizerChoice,
    *,
    tokens: int,
    accumulate: int,
    early: bool,
) -> Weighing | None:
    """A step on a machine that computes where weights lie.

    Args:
        model: To be trained; its weights may be on the meta device.
        saves: What was counted of its forward.
        hardware: The machine, as it was calibrated.
        choice: The optimizer.
        tokens: Of a backward pass.
        accumulate: Backward passes of a step.
        early: Whether updates begin in backward, which gradients then do not outlive; else they go on beside a forward.

    Returns:
        None where nothing is known of layers (they have no products, or there are none in lists), or of drives.
    """
    if not hardware.drives or not hardware.cpu.linear:
        return None
    cost, arrays = CostModel(hardware=hardware, beside=True), arrays_of(choice)
    nbytes: dict[int, int] = defaultdict(int)
    seconds: dict[int, float] = defaultdict(float)
    computed = 0.0
    for product in (saves.products if saves is not None else ()) or products_of(model, tokens):
        taken = accumulate * _product_s(cost, product)
        computed += FORWARDS * taken
        if product.again:
            nbytes[product.inputs] += product.nbytes
            seconds[product.inputs] += taken
    if not nbytes:
        return None
    sizes = [each.numel() for each in model.parameters() if each.is_floating_point()]
    states = 4 * arrays * sum(sizes)
    update = update_s(
        update_work(choice), cost, sum(sizes), arrays=arrays, tensors=len(sizes), checked_nbytes=float(states)
    )
    read_s, write_s = cost.read_s(1.0, CHUNK), cost.write_s(1.0, CHUNK)
    dear = [Dear(nbytes=nbytes[width], seconds=seconds[width]) for width in nbytes]
    dear.sort(key=lambda each: each.seconds / each.nbytes, reverse=True)
    saved = 0 if saves is None else saves.layers_nbytes
    if early:
        whole = Part(
            compute_s=computed + update,
            weight_byte_s=2 * accumulate * read_s + write_s,
            state_byte_s=read_s + write_s,
        )
        return Weighing(dear=dear, part=whole, states_nbytes=states, saved_nbytes=saved)
    forward = computed / (FORWARDS * accumulate)
    return Weighing(
        dear=dear,
        part=Part(
            compute_s=computed - forward,
            weight_byte_s=(2 * accumulate - 1) * read_s,
            gradient_byte_s=accumulate * write_s + (accumulate - 1) * read_s,
        ),
        update=Part(
            compute_s=forward + update,
            weight_byte_s=read_s + write_s,
            gradient_byte_s=read_s,
            state_byte_s=read_s + write_s,
        ),
        gradients_nbytes=sum(each.nbytes if accumulate == 1 else 4 * each.numel() for each in model.parameters()),
        states_nbytes=states,
        saved_nbytes=saved,
    )


def products_of(model: nn.Module, tokens: int) -> Sequence[Product]:
    """What layers do at least, read off their matrices: the last one of each is taken for its last product."""
    found = []
    for path in segments_of(model):
        inside = [_product(matrix, tokens) for matrix in matrices_of(model.get_submodule(path))]
        found += [*inside[:-1], *(replace(each, again=False) for each in inside[-1:])]
    return found


def matrices_of(part: nn.Module) -> Iterator[torch.Tensor]:
    """Those of products that each forward of a part does: not of experts, which come in lists."""
    lists: list[str] = []
    for path, module in part.named_modules():
        if any(path.startswith(f"{each}.") for each in lists):
            continue
        if isinstance(module, nn.ModuleList):
            lists.append(path)
        elif isinstance(module, nn.Linear):
            yield module.weight


def _product(matrix: torch.Tensor, tokens: int) -> Product:
    outputs, inputs = matrix.shape
    return Product(
        weight_nbytes=matrix.nbytes,
        rows=tokens,
        inputs=inputs,
        nbytes=tokens * outputs * matrix.itemsize,
        dtype=str(matrix.dtype).removeprefix("torch."),
        again=True,
    )


def _product_s(cost: CostModel, product: Product) -> float:
    work = Operation(kind="linear", nbytes=product.weight_nbytes, rows=product.rows, dtype=product.dtype)
    return cost.operation_s(work, "cpu")
