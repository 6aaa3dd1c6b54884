"""What is trained of a model, and the shards of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...kernels.optimizer import GRADIENT_DTYPES
from ...memory.errors import UsageError
from ..beside import trained_in
from ..build import Machinery
from ..experts.layers import fused_experts
from ..layout import Layout
from .shards import ELEMENTS, SMALL, Shard, cut_shards
from .trained import Trained, trained_as


def only_trained(model: nn.Module, names: Sequence[str]) -> None:
    """Let these parameters want a gradient and no others.

    Raises:
        UsageError: the model has not all of them.
    """
    present = dict(model.named_parameters())
    missing = [name for name in names if name not in present]
    if missing:
        raise UsageError(f"the run trains {len(names)} parameters; {len(missing)} are not in this model: {missing[0]}")
    wanted = set(names)
    for name, parameter in present.items():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in wanted)


def find_trained(model: nn.Module, machinery: Machinery) -> list[Trained]:
    """The parameters that want a gradient, in the order of `parameters()`.

    Raises:
        UsageError: there is none, or one is not streamed.
    """
    strides = {bound.name: bound.stride for binding in machinery.bindings.values() for bound in binding.tensors}
    if not machinery.trains:
        strides = {name: tuple(parameter.stride()) for name, parameter in trained_in(model).items()}
    experts = fused_experts(model)
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        if parameter.dtype not in GRADIENT_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in GRADIENT_DTYPES)
            raise UsageError(f"parameter {name} is {parameter.dtype}; what can be trained is {known}: freeze it")
        if name not in strides:
            raise UsageError(f"parameter {name} is not penstock's (a tensor subclass?): freeze it to train the others")
        found.append(trained_as(name, parameter, strides[name], experts))
    if not found:
        raise UsageError("no parameter wants a gradient: set requires_grad on those that are to be trained")
    return found


def shards_of(trained: Sequence[Trained], machinery: Machinery, *, by_expert: bool = True) -> tuple[Shard, ...]:
    """The shards of these parameters, block by block in the order in which a forward uses them.

    Args:
        trained: The parameters.
        machinery: What runs the model.
        by_expert: Whether experts that lie in one parameter have shards of their own; runs of before have not.
    """
    if not machinery.trains:
        return beside_blocks(trained)
    return shards_in(machinery.layout, trained, by_expert=by_expert)


def shards_in(layout: Layout, trained: Sequence[Trained], *, by_expert: bool = True) -> tuple[Shard, ...]:
    """The shards of parameters that lie in the blocks of a layout; see `shards_of`."""
    number = {each.name: index for index, each in enumerate(trained)}
    blocks = {
        block.id: [number[portion.name] for portion in block.portions if portion.name in number]
        for block in layout.blocks
    }
    return cut_shards(
        [each.elements for each in trained], blocks, most=ELEMENTS, experts=experts_of(trained, by_expert)
    )


def experts_of(trained: Sequence[Trained], by_expert: bool) -> list[int]:
    """How many experts each parameter is cut into."""
    return [each.experts if by_expert else 0 for each in trained]


def beside_blocks(trained: Sequence[Trained]) -> tuple[Shard, ...]:
    """The shards of what is trained beside frozen weights: it counts as one block, which is never withdrawn."""
    return cut_shards([each.elements for each in trained], {SMALL: range(len(trained))})
