"""Lending a module its real weights outside a run: for looking at them, or for code that bypasses `forward`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..memory.errors import ReadOnlyWeightError
from .binding import Binding
from .build import Machinery


@contextmanager
def gathered(machinery: Machinery, module: nn.Module) -> Iterator[nn.Module]:
    """Give the parameters of `module` copies of their values while the context lasts.

    The copies are fresh memory of the caller's making, outside every budget: a lease on so many slots could leave none
    for a run in another thread. A run inside the context works too, and leaves the copies in place.

    Raises:
        ReadOnlyWeightError: on leaving, if a weight was changed; the change is gone.
    """
    wanted = {id(parameter) for parameter in module.parameters()}
    lent: list[tuple[nn.Parameter, torch.Tensor, Binding | None, int]] = []
    try:
        for key in wanted & set(machinery.tables):
            table = machinery.tables[key]
            whole = table.whole()
            machinery.session.appear(table.parameter)
            lent.append((table.parameter, table.parameter.data, None, -1))
            table.parameter.data = whole
        for binding in machinery.bindings.values():
            indices = [i for i, bound in enumerate(binding.tensors) if id(bound.parameter) in wanted]
            if indices and binding.block and id(binding.tensors[0].parameter) not in machinery.tables:
                _lend(machinery, binding, indices, lent)
        versions = [parameter._version for parameter, *_ in lent]
        yield module
        for (parameter, *_), version in zip(lent, versions, strict=True):
            if parameter._version != version:
                raise ReadOnlyWeightError(
                    "a gathered weight was changed in place; it was lent for reading, and the change is lost. Change "
                    "it before offloading, or train with penstock.prepare"
                )
    finally:
        with machinery.session.bind_lock:
            for parameter, empty, home, index in lent:
                if home is not None:
                    home.tensors[index].empty = empty
                if home is None or not home.uses:
                    parameter.data = empty
                    machinery.session.vanish(parameter)


def _lend(
    machinery: Machinery,
    binding: Binding,
    indices: list[int],
    lent: list[tuple[nn.Parameter, torch.Tensor, Binding | None, int]],
) -> None:
    session = machinery.session
    lease = machinery.executor.acquire(binding.block, observed=False)
    try:
        session.device.compute_waits(lease.residence.event)
        session.bring_up_to_date(binding.block, lease.residence.slot)
        views = binding.views(session.arena, lease.residence.slot)
        with session.bind_lock:
            for index in indices:
                bound = binding.tensors[index]
                copy = views[index].detach().clone()
                lent.append((bound.parameter, bound.empty, binding, index))
                bound.empty = copy  # what is left behind when a lease ends
                if not binding.uses:
                    session.appear(bound.parameter)
                    bound.parameter.data = copy
    finally:
        machinery.executor.release(lease, session.device.computed())
