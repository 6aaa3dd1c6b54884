"""Gradients on their way back from disk: the pieces of a shard, beside its masters and states."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch

from ...memory.errors import DiskError
from ...memory.transfer import Transfer
from .watch import Watch


class GradientRead:
    """Pieces of one shard on their way back."""

    def __init__(self, transfer: Transfer, tensors: Mapping[int, torch.Tensor], what: str, watch: Watch) -> None:
        self.tensors = tensors
        """By parameter, flat: the elements of its piece. There when `wait` has returned."""
        self._transfer = transfer
        self._what = what
        self._watch = watch

    def wait(self) -> None:
        """Wait for it.

        Raises:
            DiskError: it cannot be read.
            StallError: nothing moves any more.
        """
        try:
            self._watch.transfer(self._transfer, lambda: f"an update waits for {self._what} to be read back")
        except DiskError as error:
            raise lost(self._what, error) from error

    def cancel(self) -> None:
        """Give it up, and wait until nothing is written to memory any more."""
        self._transfer.cancel()
        with suppress(Exception):  # what it met is of no interest any more
            self._watch.transfer(self._transfer, lambda: f"an update that ends waits for the reading of {self._what}")


def lost(what: str, error: DiskError) -> DiskError:
    """That a gradient cannot be had back."""
    return DiskError(
        f"{what} is lost, which went through the run's scratch folder: {error}. See that nothing else fills or changes "
        "that folder, or give more host memory, which keeps gradients there"
    )
