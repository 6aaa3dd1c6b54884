"""Optimizers as a user names them: `penstock.AdamW(lr=1e-5, max_grad_norm=1.0)`, and the parameter groups they make."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ...kernels.optimizer import Optimizer
from ...kernels.optimizers import optimizer
from ...memory.errors import UsageError

OWN = frozenset({"max_grad_norm", "groups"})
"""Fields that are no hyperparameters."""


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """An optimizer with its hyperparameters."""

    mathematics: ClassVar[str]
    """Its name in `kernels.optimizers`."""
    max_grad_norm: float | None = None
    """Clip the norm of all gradients to this, as `torch.nn.utils.clip_grad_norm_` does."""
    groups: Mapping[str, Mapping[str, Any]] | None = field(default=None, repr=False)
    """Name pattern (`*bias`, `model.layers.0.*`) to hyperparameters that differ there; the first match counts."""

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UsageError(f"max_grad_norm is {self.max_grad_norm}: give a norm above 0, or None not to clip")
        try:
            states = self.kernel.states_of(self.kernel.hyper_of(self.defaults()))
            for pattern, overrides in (self.groups or {}).items():
                unknown = overrides.keys() - self.defaults().keys()
                if unknown:
                    raise UsageError(
                        f"group {pattern!r} sets {', '.join(sorted(unknown))}: {type(self).__name__} has "
                        f"{', '.join(self.defaults())}"
                    )
                hyper = self.kernel.hyper_of({**self.defaults(), **overrides})
                if self.kernel.states_of(hyper) != states:
                    raise UsageError(
                        f"group {pattern!r} keeps other states ({', '.join(self.kernel.states_of(hyper)) or 'none'}) "
                        f"than the rest ({', '.join(states) or 'none'}): let all groups have momentum, or none"
                    )
        except ValueError as error:
            raise UsageError(str(error)) from error

    @property
    def kernel(self) -> Optimizer[Any]:
        """Its mathematics."""
        return optimizer(self.mathematics)

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters where no group says otherwise."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OWN}

    def grouped(self, names: Sequence[str]) -> list[tuple[dict[str, Any], list[int]]]:
        """Hyperparameters, and the numbers of the parameters that have them. The last group is what no pattern matches.

        Raises:
            UsageError: a pattern matches nothing.
        """
        left = dict(enumerate(names))
        found: list[tuple[dict[str, Any], list[int]]] = []
        for pattern, overrides in (self.groups or {}).items():
            if not fnmatch.filter(names, pattern):
                raise UsageError(
                    f"group {pattern!r} matches none of {len(names)} trained parameters; they are named like {names[0]}"
                )
            members = [index for index, name in left.items() if fnmatch.fnmatchcase(name, pattern)]
            for index in members:
                del left[index]
            found.append(({**self.defaults(), **overrides}, members))
        found.append((self.defaults(), list(left)))
        return [(hyper, members) for hyper, members in found if members]


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerChoice):
    """AdamW (Loshchilov and Hutter, 2019), with an fp32 master: bit-equal to `torch.optim.AdamW` on fp32 parameters."""

    mathematics: ClassVar[str] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerChoice):
    """Stochastic gradient descent, with an fp32 master: bit-equal to `torch.optim.SGD` on fp32 parameters."""

    mathematics: ClassVar[str] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerChoice):
    """Lion (Chen et al., 2023: "Symbolic Discovery of Optimization Algorithms"), with an fp32 master."""

    mathematics: ClassVar[str] = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
