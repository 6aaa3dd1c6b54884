"""The net under the streamed model: every torch call is looked at for a parameter that is not there.

Most parameters are leased by the forward of the module that owns them. Some models reach past it (a mixer that uses its
convolution's weight, a head tied to an embedding); such a use finds a placeholder, and the call is given the real bytes
first. Parameters served by rows (embedding tables, large output projections) are recognised here too, by the call that
uses them rather than by the module, so that subclasses and ties need no special case.

A torch function mode costs about two microseconds per call and does not change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .session import Session

_VALUE_GETTERS = {"data", "T", "mT", "H", "mH", "real", "imag"}
_METADATA = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "storage_offset",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "is_inference",
    "is_pinned",
    "is_shared",
    "get_device",
    "type",
    "__len__",
    "__hash__",
    "__repr__",
    "requires_grad_",
    "result_type",
    "can_cast",
    "is_tensor",
    "is_same_size",
}


def reads_values(func: Callable[..., Any]) -> bool:
    """Whether a torch function looks at a tensor's values, not only at its shape, dtype or device."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUE_GETTERS
    return name not in _METADATA


class Intercept(TorchFunctionMode):
    """Active during a root call of one streamed model."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, first fetching what it needs and does not have."""
        absent = self._session.absent
        missing: list[nn.Parameter] | None = None
        for value in args if not kwargs else (*args, *kwargs.values()):
            kind = value.__class__
            if kind is nn.Parameter:
                if id(value) in absent:
                    missing = [*(missing or ()), value]
            elif kind is list or kind is tuple:
                for item in value:
                    if item.__class__ is nn.Parameter and id(item) in absent:
                        missing = [*(missing or ()), item]
        if missing is None or not reads_values(func):
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._session.call_with(missing, func, args, dict(kwargs or {}))


def rows_wanted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The row numbers, if the call looks rows of its table up: `embedding(ids, table)` or `table[ids]`."""
    if func is functional.embedding:
        if kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None):
            return None
        ids = args[0] if args else kwargs["input"]
        return ids if isinstance(ids, torch.Tensor) else None
    if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
        return args[1] if args[1].dtype in (torch.int32, torch.int64) else None
    return None


def is_linear(func: Callable[..., Any]) -> bool:
    """Whether the call is a linear layer."""
    return func is functional.linear
