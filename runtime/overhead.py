"""What a model takes of memory beside its blocks: buffers of reads and of its own, and what training needs."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.disk import DiskEngine
from .layout import Changing


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Bytes that are gone before blocks get their places."""

    buffers_nbytes: int
    """Of the module's buffers."""
    changing: Changing | None = None
    """It is to be trained, and that takes so much."""
    before_nbytes: int = 0
    """Host memory that activations have before weights, where not all of these stay."""

    @property
    def device_nbytes(self) -> int:
        """Memory of a device apart."""
        return 0 if self.changing is None else self.changing.own_device_nbytes

    def training_nbytes(self, *, stays: bool) -> int:
        """What training takes of host memory at least; `stays`: where all weights are in the arena."""
        if self.changing is None:
            return 0
        return self.changing.own_nbytes + (-self.changing.moving_nbytes if stays else self.before_nbytes)

    def host_nbytes(self, staging_nbytes: int, *, stays: bool = False) -> int:
        """Host memory besides the arena; `stays`: where all weights are in it."""
        staging = DiskEngine.own_nbytes(staging_nbytes) if staging_nbytes else 0
        return self.training_nbytes(stays=stays) + self.buffers_nbytes + staging
