"""Where new weights of adapters go: to the tensors that the model computes with, which are always there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ...memory.arena import Slot
from .trained import Trained


class AdapterWeights:
    """The weights of what is trained beside streamed blocks, while they change. They count as one block.

    On a device apart they are put together in host memory, and copied there as a whole.

    Args:
        trained: Whose.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self._homes = {each.name: flat(each) for each in trained}
        self._host = {name: home if home.device.type == "cpu" else home.cpu() for name, home in self._homes.items()}

    def names(self, block: int) -> Sequence[str]:
        """The parameters of the block."""
        return list(self._homes)

    def is_free(self, block: int) -> bool:
        """There is one block."""
        return True

    def written_nbytes(self, blocks: Collection[int]) -> int:
        """Nothing: they are in memory."""
        return 0

    def begin(self, block: int, *, whole: bool) -> Mapping[str, torch.Tensor]:
        """The weights, to be written to: flat, as they lie in memory, by the parameter's name."""
        return self._host

    def end(self, block: int) -> None:
        """All that was to be written to them has been. What computed with them must have been enqueued."""
        for name, home in self._homes.items():
            if self._host[name] is not home:
                home.copy_(self._host[name])

    def begin_lent(self, block: int, slot: Slot) -> Mapping[str, torch.Tensor]:
        """They are in no slot."""
        raise AssertionError(f"block {block} of adapters is not lent")

    def end_lent(self, block: int, slot: Slot, changed: Sequence[tuple[str, int, int]]) -> None:
        """They are in no slot."""
        raise AssertionError(f"block {block} of adapters is not lent")

    def value(self, name: str) -> torch.Tensor:
        """A parameter's present weights in fp32, flat, as they lie in memory."""
        return self._homes[name].to("cpu", torch.float32, copy=True)

    def close(self) -> None:
        """Nothing has to be given back: the tensors are the model's."""


def flat(each: Trained) -> torch.Tensor:
    """The elements of a parameter that is in memory as one row, to be written to unnoticed by autograd."""
    return each.parameter.data.as_strided((each.elements,), (1,))
