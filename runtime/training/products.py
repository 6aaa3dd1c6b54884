"""Products with weights that a forward does, noted while it runs on tensors without bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .saves import Product

_aten: Final = torch.ops.aten
_FACTORS: Final[dict[Any, tuple[int, int]]] = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.convolution.default: (0, 1),
}
"""Where each product has its two factors. Those of experts are not among them: how many rows use which is chance."""


class Products(TorchDispatchMode):
    """Notes them, and which of them are the last of a layer.

    Args:
        model: On fake tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Product] = []
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._begun: int | None = None
        """Where the layer that runs now has begun; None outside of layers."""

    def enter(self) -> None:
        """A layer begins."""
        self._begun = len(self.found)

    def leave(self) -> None:
        """It ends: what makes its last product again has no use for it."""
        if self._begun is not None and len(self.found) > self._begun:
            self.found[-1] = replace(self.found[-1], again=False)
        self._begun = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and note it if it is a product with weights."""
        result = func(*args, **(kwargs or {}))
        if func in _FACTORS:
            left, right = (args[place] for place in _FACTORS[func])
            for weight in (right, left):
                if weight.untyped_storage()._cdata in self._weights:
                    self.found.append(self._product(weight, result, last_is_width=weight is right))
                    break
        return result

    def _product(self, weight: Tensor, result: Tensor, *, last_is_width: bool) -> Product:
        width = weight.shape[0] if weight.dim() == 4 else weight.shape[-1 if last_is_width else -2]
        nbytes = min(weight.untyped_storage().nbytes(), weight.numel() * weight.element_size())  # it may be expanded
        elements = nbytes // weight.element_size()
        return Product(
            weight_nbytes=nbytes,
            rows=result.numel() / width,
            inputs=elements // width,
            nbytes=result.numel() * result.element_size(),
            dtype=str(weight.dtype).removeprefix("torch."),
            again=self._begun is not None,
        )
