"""The net under the streamed model: a parameter that is not there catches every torch call that uses it.

Most parameters are leased by the forward of the module that owns them. Some models reach past it (a mixer that uses its
convolution's weight, a head tied to an embedding); such a use finds a placeholder, and the call is given the real bytes
first. Parameters served by rows (embedding tables, large output projections) are recognised here too, by the call that
uses them rather than by the module, so that subclasses and ties need no special case.

While its bytes are away, a parameter's class is a subclass of `nn.Parameter` with a `__torch_function__` of its own, so
that torch itself finds it among a call's arguments. Calls that use no such parameter cost nothing. torch does not look
at what it takes for plain data: `torch.tensor(weight)` and `x.new_tensor(weight)` see the placeholder, and are to be
written `weight.clone()`, as torch itself advises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

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
    "__len__",
    "__hash__",
    "__repr__",
    "requires_grad_",
    "result_type",
    "can_cast",
    "is_tensor",
    "is_same_size",
}


def reads_values(func: Callable[..., Any], arguments: int = 1) -> bool:
    """Whether a torch function, called with so many arguments, looks at a tensor's values, not only at its shape, dtype
    or device."""
    name = getattr(func, "__name__", "")
    if name == "type":  # with a dtype it converts
        return arguments > 1
    if name == "__set__":
        return False
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUE_GETTERS
    return name not in _METADATA


class AbsentParameter(nn.Parameter):
    """A parameter whose bytes are not there. Made by `absent_class`, which binds it to a model."""

    _session: ClassVar[weakref.ref[Session]]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, first fetching what it needs and does not have."""
        session = cls._session()
        if session is not None and session.running_here() and reads_values(func, len(args) + len(kwargs or ())):
            missing = _found(cls, args if not kwargs else (*args, *kwargs.values()))
            if missing:
                return session.stray.call(missing, func, args, dict(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs) if kwargs else func(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy of the placeholder, which no model is responsible for."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(deepcopy(self.data, memo), self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found


def absent_class(session: Session) -> type[AbsentParameter]:
    """The class of a model's parameters while their bytes are away."""

    class Absent(AbsentParameter):
        _session = weakref.ref(session)

    return Absent


def _found(cls: type[AbsentParameter], values: tuple[Any, ...]) -> list[nn.Parameter]:
    """The absent parameters of one model among a call's arguments, also those in a list."""
    found: list[nn.Parameter] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += _found(cls, tuple(value))
        elif isinstance(value, cls):
            found.append(value)
    return found


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
