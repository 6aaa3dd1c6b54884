"""LoRA (Hu et al., 2021) on a model without weights: adapters as PEFT puts them, to rehearse what they take.

PEFT itself is an optional dependency, and not needed to foresee. What is here has the same tensors, and the same
operations in the same order, as `peft.tuners.lora.layer.Linear.forward` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .rehearsal import mode_of

SCALING = 2.0
"""Of what adapters add: what it is takes no other time."""


def add_adapters(
    model: PreTrainedModel, *, rank: int, targets: Collection[str] = (), dropout: float = 0.0
) -> list[nn.Parameter]:
    """Put adapters beside linear layers, and give their parameters. They are fp32, as PEFT makes them beside weights of
    any float dtype.

    Args:
        model: With fake weights (`rehearsal.make_fake`), none of which wants a gradient.
        rank: Of each adapter.
        targets: Ends of the names of the layers that get one; all linear layers but the output layer where none is
            named.
        dropout: Of what goes into them.
    """
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    made: list[nn.Parameter] = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if not (_named(path, targets) if targets else module is not output):
            continue
        narrow, wide = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
        with mode_of(model):
            down = nn.Parameter(torch.empty(rank, narrow, dtype=torch.float32))
            up = nn.Parameter(torch.empty(wide, rank, dtype=torch.float32))
        module.register_parameter("lora_a", down)
        module.register_parameter("lora_b", up)
        module.register_forward_hook(partial(_adapted, down, up, dropout))
        made += [down, up]
    return made


def _named(path: str, targets: Collection[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _adapted(
    down: Tensor, up: Tensor, dropout: float, module: nn.Module, args: tuple[Tensor, ...], result: Tensor
) -> Tensor:
    x = args[0].to(down.dtype)
    if dropout:
        x = drop(x, dropout, training=module.training)
    return (result + linear(linear(x, down), up) * SCALING).to(result.dtype)
