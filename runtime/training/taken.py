"""What `.grad` shows of a gradient that was taken away as soon as it was made: that there is one, and its norm.

It can be multiplied by a number, where it is kept, so that `clip_grad_norm_` and transformers' Trainer clip it as they
clip any other. Were `.grad` None, they and `GradScaler` would find nothing to do, and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch

from ...memory.errors import UsageError
from ..binding import placeholder

_METADATA: Final = frozenset(
    {
        *("shape", "dtype", "device", "layout", "is_sparse", "is_cuda", "requires_grad", "grad_fn", "is_leaf", "ndim"),
        *("size", "dim", "numel", "nelement", "element_size", "stride", "is_floating_point", "is_complex", "is_tensor"),
        *("get_device", "__len__", "__hash__", "nbytes", "itemsize", "is_quantized", "is_meta", "data_ptr"),
    }
)
_NORMS: Final = frozenset({"vector_norm", "linalg_vector_norm", "_foreach_norm"})
_PRODUCTS: Final = frozenset({"mul_", "_foreach_mul_"})


class TakenGradient(torch.Tensor):
    """Stands in `.grad` for a gradient that is kept elsewhere. Its values are one NaN."""

    _kept: Callable[[], torch.Tensor]
    _scale: Callable[[torch.Tensor | float], None]

    @classmethod
    def of(
        cls,
        parameter: torch.Tensor,
        kept: Callable[[], torch.Tensor],
        scale: Callable[[torch.Tensor | float], None],
    ) -> TakenGradient:
        """Make the one of a parameter. `kept` gives the gradient, flat; `scale` multiplies it where it is kept."""
        made = placeholder(parameter, parameter.device).as_subclass(cls)
        made._kept = kept
        made._scale = scale
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Say what is known without the values, and multiply them where they are kept; refuse the rest.

        Raises:
            UsageError: values are wanted.
        """
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        options = {key: value for key, value in (kwargs or {}).items() if value is not None}
        if name in _NORMS and len(args) <= 2 and options.keys() <= {"ord", "dtype"}:
            if isinstance(args[0], TakenGradient):
                return torch.linalg.vector_norm(args[0]._kept(), *args[1:], **options)
            if isinstance(args[0], list | tuple):
                return [torch.linalg.vector_norm(_values(each), *args[1:], **options) for each in args[0]]
        if name in _PRODUCTS and not options and _is_number(args[1]):
            each: Any
            for each in args[0] if isinstance(args[0], list | tuple) else [args[0]]:
                (each._scale if isinstance(each, TakenGradient) else each.mul_)(args[1])
            return args[0]
        _refuse(name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TakenGradient(shape={tuple(self.shape)}, dtype={self.dtype})"


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient._kept() if isinstance(gradient, TakenGradient) else gradient


def _is_number(factor: object) -> bool:
    if isinstance(factor, torch.Tensor):
        return factor.dim() == 0 and not isinstance(factor, TakenGradient)
    return isinstance(factor, int | float)


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        f"{what} on a gradient of a streamed model: it was taken as soon as it was made, and in .grad it has a norm "
        "and can be multiplied by a number, no more. Clip with clip_grad_norm_, or with max_grad_norm, as in "
        "penstock.AdamW(lr=…, max_grad_norm=1.0); use bfloat16 or float32, which need no GradScaler"
    )
