"""What every optimizer of flat arrays has in common: its record, the loop over sub-chunks, the checks.

A parameter's fp32 master and the states of its optimizer are flat fp32 arrays, on disk and in the buffers they are read
into. An update is elementwise, so it can be made on any piece of them. Optimizers differ in a few lines of arithmetic
(`Rule`), each in a file of its own; `optimizers.py` is the table of them.

**Passes.** Plain torch needs about ten operations for AdamW, and each is a pass over memory. Here they run over
sub-chunks that stay in the processor's caches, in place or into `Scratch`, so that DRAM is passed once: every array is
read once and written once. Of each element, in bytes, for a bf16 gradient and bf16 weights:

    AdamW           read 12 + 2, written 12 + 2      (master, exp_avg, exp_avg_sq; gradient; weight)
    Lion, SGD       read  8 + 2, written  8 + 2      (master, exp_avg or momentum_buffer; gradient; weight)
    SGD, plain      read  4 + 2, written  4 + 2

(A processor that cannot know that the weight's lines will be overwritten whole reads them too.)

**Bits.** The operations are torch's own, in the order of its single-tensor optimizers with default arguments, on an
fp32 master. `splits_exactly` says whether their results depend on where arrays are cut: they did not where it was
tried, but for one thing. torch computes what is left over at the end of an array by other instructions, and where
`betas[0]` is 0, its `lerp_` gives zeros another sign there. The sign and payload of a NaN are no result either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from .scratch import GRAIN, Scratch

GRADIENT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""What a gradient, and the copy of the master that computes, may be."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What gradients are multiplied by before the update. See `norms.clip_coefficient`."""

    coefficient: torch.Tensor
    """0-dim, in the dtype that torch works it out in. Where it is 1, nothing is multiplied."""
    widen: bool = False
    """False: the product is rounded to the gradient's own dtype, as `clip_grad_norm_` leaves it in `.grad`. True: a
    half gradient is made fp32 first, as if `clip_grad_norm_` had been given `grad.float()`."""


class Hyper(Protocol):
    """Hyperparameters of one update: a frozen, keyword-only record, its fields named as torch's parameter groups do.

    Defaults are torch's. A value without a meaning raises `ValueError` when the record is made.
    """

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def weight_decay(self) -> float:
        """Weight decay; what it means is the optimizer's."""


def require(name: str, value: float, *, below: float = inf) -> None:
    """Check a hyperparameter.

    Raises:
        ValueError: it is not a number, is negative, or not below `below`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; a number is needed")
    if not value >= 0:  # NaN too
        raise ValueError(f"{name} is {value}; it must not be negative")
    if below < inf and not value < below:
        raise ValueError(f"{name} is {value}; it must be below {below:g}")


def require_betas(betas: tuple[float, ...], example: str) -> None:
    """Check two shares below 1.

    Raises:
        ValueError: there are more or fewer, or one is no such share.
    """
    if len(betas) != 2:
        raise ValueError(f"betas has {len(betas)} values; 2 are needed, such as {example}")
    for index, beta in enumerate(betas):
        require(f"betas[{index}]", beta, below=1)


H = TypeVar("H", bound=Hyper)
H_contra = TypeVar("H_contra", bound=Hyper, contravariant=True)


class Rule(Protocol[H_contra]):
    """The arithmetic of one optimizer on one sub-chunk."""

    def __call__(
        self,
        master: torch.Tensor,
        states: Sequence[torch.Tensor],
        grad: torch.Tensor,
        hyper: H_contra,
        step: int,
        scratch: Scratch,
    ) -> None:
        """Update `master` and `states` in place.

        All are fp32 [n], and so are the arrays of `scratch`. `grad` is `scratch.wide`, or the caller's own and then not
        to be written to.
        """


@dataclass(frozen=True, kw_only=True)
class Optimizer(Generic[H]):
    """What a runtime needs to know of an optimizer."""

    name: str
    hyper: type[H]
    """The record of hyperparameters."""
    states_of: Callable[[H], tuple[str, ...]]
    """Names of the fp32 arrays that are kept for each element beside its master, as torch's `state_dict` names them.
    All start as zeros."""
    rule: Rule[H]

    def nbytes_per_element(self, hyper: H) -> int:
        """Bytes of master and states of one element, as they lie on disk."""
        return 4 * (1 + len(self.states_of(hyper)))

    def hyper_of(self, group: Mapping[str, Any]) -> H:
        """The record for a parameter group as torch's schedulers see it; what it does not name has its default.

        Raises:
            ValueError: a value has no meaning.
        """
        return self.hyper(**{f.name: group[f.name] for f in fields(self.hyper) if f.name in group})  # type: ignore[arg-type]

    def update(
        self,
        master: torch.Tensor,
        states: Sequence[torch.Tensor],
        grad: torch.Tensor,
        hyper: H,
        *,
        step: int,
        scratch: Scratch,
        out: torch.Tensor | None = None,
        clip: Clip | None = None,
    ) -> None:
        """One update of flat arrays, in place.

        Allocates no memory for elements. May be called from any thread, with a `Scratch` of that thread's own: one of
        at most ALONE elements where torch's threads have something else to do.

        Args:
            master: fp32 [n], contiguous.
            states: fp32 [n] each, contiguous, in the order of `states_of(hyper)`.
            grad: bf16, fp16 or fp32 [n], contiguous; not changed.
            hyper: The hyperparameters of this update.
            step: Which update of these elements this is, from 1. A step without a gradient for them does not count.
            scratch: The calling thread's.
            out: bf16, fp16 or fp32 [n], contiguous: gets the new master, rounded to nearest even.
            clip: What to multiply the gradient by.

        Raises:
            ValueError: lengths, dtypes or the number of states do not fit, or `step` is below 1.
        """
        self._check(master, states, grad, hyper, step, out)
        size = scratch.elements
        coefficient = None if clip is None or clip.coefficient.item() == 1 else clip.coefficient
        widen = clip is not None and clip.widen
        with torch.no_grad():
            grads = torch.split(grad, size)
            outs: Sequence[torch.Tensor | None] = [None] * len(grads) if out is None else torch.split(out, size)
            kept = zip(*(torch.split(state, size) for state in states), strict=True) if states else [()] * len(grads)
            for here, mine, g, written in zip(torch.split(master, size), kept, grads, outs, strict=True):
                room = scratch.first(len(here))
                self.rule(here, mine, _widened(g, coefficient, widen, room), hyper, step, room)
                if written is not None:
                    written.copy_(here)

    def _check(
        self,
        master: torch.Tensor,
        states: Sequence[torch.Tensor],
        grad: torch.Tensor,
        hyper: H,
        step: int,
        out: torch.Tensor | None,
    ) -> None:
        names = self.states_of(hyper)
        if len(states) != len(names):
            raise ValueError(
                f"{self.name} keeps {len(names)} states under these hyperparameters ({', '.join(names) or 'none'}); "
                f"{len(states)} were given"
            )
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1, the first update of a parameter")
        operands = {"master": master, **dict(zip(names, states, strict=True)), "grad": grad}
        if out is not None:
            operands["out"] = out
        for name, tensor in operands.items():
            allowed = GRADIENT_DTYPES if name in ("grad", "out") else (torch.float32,)
            if tensor.dtype not in allowed:
                raise ValueError(f"{name} is {tensor.dtype}; {' or '.join(map(str, allowed))} is needed")
            if tensor.dim() != 1 or len(tensor) != len(master) or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
                    f"flat and contiguous [{master.numel()}] is needed, as master has it"
                )


def _widened(grad: torch.Tensor, coefficient: torch.Tensor | None, widen: bool, scratch: Scratch) -> torch.Tensor:
    """The gradient of a sub-chunk, multiplied by the coefficient, in fp32."""
    wide = scratch.wide
    if grad.dtype == torch.float32:
        return grad if coefficient is None else torch.mul(grad, coefficient, out=wide)
    if coefficient is None:
        return wide.copy_(grad)
    if widen:
        return wide.copy_(grad).mul_(coefficient)
    return wide.copy_(torch.mul(grad, coefficient, out=scratch.halves[grad.dtype]))


def splits_exactly(optimizer: Optimizer[H], hyper: H, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether arrays may be cut anywhere: whether updates of single elements give the values of an update of all.

    torch computes what is left over at the end of an array by other instructions than the rest. Where the two round
    differently, only cuts at multiples of GRAIN elements, counted from the start of a parameter, keep the bits of
    torch's own update of it, and of that only on one thread.

    Args:
        optimizer: Whose arithmetic is tried.
        hyper: With these hyperparameters.
        dtype: Of gradient and weight; gradients are clipped as well.
    """
    generator = torch.Generator().manual_seed(0)
    scratch = Scratch.of()
    clip = Clip(coefficient=torch.tensor(0.3, dtype=dtype))
    kept = len(optimizer.states_of(hyper))
    whole = torch.rand(1 + kept, 4 * GRAIN + 1, generator=generator)  # averages of squares are positive
    single = whole.clone()
    outs = [torch.empty(whole.shape[1], dtype=dtype) for _ in range(2)]
    for step in (1, 2):
        grad = torch.randn(whole.shape[1], generator=generator).to(dtype)
        optimizer.update(whole[0], [*whole[1:]], grad, hyper, step=step, scratch=scratch, out=outs[0], clip=clip)
        for i in range(len(grad)):
            one = slice(i, i + 1)
            states = [state[one] for state in single[1:]]
            optimizer.update(
                single[0, one], states, grad[one], hyper, step=step, scratch=scratch, out=outs[1][one], clip=clip
            )
    return torch.equal(whole, single) and torch.equal(*outs)
