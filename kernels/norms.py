"""The norm of all gradients, and what they are clipped by, with the bits of `torch.nn.utils.clip_grad_norm_`.

torch takes the 2-norm of each parameter's gradient, in the gradient's dtype, and the 2-norm of these norms, in the
order of `parameters()`. So a gradient can be let go when its norm is known, in whatever order gradients arrive. Its two
ways, `foreach` or not (the former is the default), give the same bits on CPUs; on CUDA the former is taken here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import get_total_norm


def gradient_norm(grad: torch.Tensor) -> torch.Tensor:
    """The 2-norm of one parameter's gradient: 0-dim, of its dtype. Reads it once and allocates nothing of its size.

    A half gradient is summed in fp32 and the root is rounded to its dtype. The order of the sum, and so its bits,
    depend on the length, and for halves on the number of torch's threads: a gradient must be given whole, on as many
    threads as the resident run has. Its shape does not matter as long as its elements lie one after another.
    """
    with torch.no_grad():
        if grad.is_cuda:  # clip_grad_norm_ takes its other way there, whose sums are in another order
            alone: torch.Tensor = torch._foreach_norm([grad], 2.0)[0]
            return alone
        norm: torch.Tensor = torch.linalg.vector_norm(grad, 2.0)
    return norm


def total_norm(norms: Sequence[torch.Tensor], *, error_if_nonfinite: bool = False) -> torch.Tensor:
    """The norm of all gradients, 0-dim; fp32 0 if there are none.

    Args:
        norms: What `gradient_norm` gave, in the order of `parameters()`, those without a gradient left out. Where
            dtypes differ, torch takes one dtype after the other and works in the wider one, and so does this.
        error_if_nonfinite: Whether a norm that is inf or NaN is an error.

    Raises:
        RuntimeError: it is, and torch's message says so.
    """
    # torch's own function takes the norm of each norm first, which is the norm itself
    return get_total_norm([norm.view(1) for norm in norms], 2.0, error_if_nonfinite)


def clip_coefficient(total: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What every gradient is multiplied by, 0-dim, of `total`'s dtype: max_norm / (total + 1e-6), at most 1.

    NaN where the norm is NaN and 0 where it is inf, as in torch.

    Raises:
        ValueError: `max_norm` is negative or no number.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm}; a norm is 0 or more")
    return torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)


class GradientNorms:
    """The norms of one step's gradients, which come in any order and from any thread."""

    def __init__(self, count: int) -> None:
        """`count`: how many parameters there are."""
        self._norms: list[torch.Tensor | None] = [None] * count

    def add(self, index: int, grad: torch.Tensor) -> None:
        """Note the gradient of a parameter, which may be let go afterwards.

        Args:
            index: The parameter's place in `parameters()`.
            grad: Its whole gradient of this step.

        Raises:
            ValueError: there is no such parameter, or its gradient came before.
        """
        self.note(index, gradient_norm(grad))

    def note(self, index: int, norm: torch.Tensor) -> None:
        """The same for a gradient that has been let go already: what `gradient_norm` gave. Raises as `add` does."""
        if not 0 <= index < len(self._norms):
            raise ValueError(f"parameter {index} of {len(self._norms)}: there is none")
        if self._norms[index] is not None:
            raise ValueError(f"the gradient of parameter {index} came twice in one step: add it up first")
        self._norms[index] = norm

    def total(self, *, error_if_nonfinite: bool = False) -> torch.Tensor:
        """The norm of all that came; see `total_norm`."""
        return total_norm([norm for norm in self._norms if norm is not None], error_if_nonfinite=error_if_nonfinite)
