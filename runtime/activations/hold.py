"""One storage that autograd has saved, wherever its bytes are now, and the tensors that are views of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from ...scheduler.activations import Place
from ...scheduler.mover import Event

if TYPE_CHECKING:
    from .store import ActivationStore
    from .trail import Trail


class Where(Enum):
    """Of the bytes of a storage."""

    HERE = "here"
    """In the memory that computes; nothing is under way."""
    QUEUED = "queued"
    """There, and it will leave."""
    LEAVING = "leaving"
    """There, and being copied away."""
    AWAY = "away"
    COMING = "coming"
    """Its memory is made, and will be filled."""
    LOST = "lost"
    """It could not be written, or not be read back."""


@dataclass(kw_only=True, slots=True, eq=False)
class Piece:
    """Bytes of a storage in one place."""

    place: Place
    start: int
    nbytes: int
    offset: int = 0
    """In the host arena, or in the file."""
    path: str = ""
    """Of the file."""
    checksum: int | None = None
    """Of what went to disk."""
    kept: torch.Tensor | None = None
    """Of what stays in the memory that computes while other pieces leave."""


@dataclass(kw_only=True, slots=True, eq=False, weakref_slot=True)
class Hold:
    """One storage. Who has it can have its bytes back; with the last who has it they are forgotten.

    All of it is the store's, and changed under its lock.
    """

    store: ActivationStore
    nbytes: int
    number: int
    """In the order in which storages were taken, for messages."""
    forward: int
    """Of which forward it is."""
    storage: torch.UntypedStorage | None
    where: Where = Where.HERE
    pieces: Sequence[Piece] = ()
    made: Event = None
    """After what writes the storage, and, when it comes back, after what used its new memory before."""
    ready: Event = None
    """After the copies that bring it back."""
    wanted: bool = False
    """Whether it was asked for while it was leaving: it stays."""
    kept_nbytes: int = 0
    """That count as kept."""
    writes: int = 0
    """That have not landed."""
    error: Exception | None = None
    trail: Trail | None = None
    """The forward that left it."""
    label: str = ""
    """What saved it."""

    def __del__(self) -> None:
        queued = self.nbytes if self.where is Where.QUEUED else 0
        if self.pieces or queued or self.kept_nbytes:
            self.store.forget(self.pieces, queued, self.kept_nbytes)


class Witness:
    """Tells whether a tensor has been changed since, without keeping its bytes.

    A detached tensor shares the counter that changes in place are counted by, also one that is detached below autograd,
    if views are noted there; giving it other bytes leaves it that.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._tensor = tensor.detach()
        self._tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._version = tensor._version

    @property
    def version(self) -> int:
        """When it was made."""
        return self._version

    @property
    def changed(self) -> bool:
        """Whether it has been."""
        return self._tensor._version != self._version

    @property
    def now(self) -> int:
        """How often it has been changed in all."""
        return self._tensor._version


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How a tensor lies in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements."""
    dtype: torch.dtype
    conjugate: bool = False
    negative: bool = False
    """Whether it is what lies there conjugated, or negated: torch does that where it is used."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        """That of a strided tensor."""
        return cls(
            size=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
            dtype=tensor.dtype,
            conjugate=tensor.is_conj(),
            negative=tensor.is_neg(),
        )

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, without a history."""
        with torch.inference_mode(False), torch.no_grad():
            made = torch.empty(0, dtype=self.dtype, device=storage.device)
            made.set_(storage, self.offset, self.size, self.stride)
            made = made.conj() if self.conjugate else made
            return torch._neg_view(made) if self.negative else made


class HeldTensor:
    """A saved tensor whose storage is held. A graph owns it; it owns no tensor with a history."""

    __slots__ = ("_kind", "hold", "shape", "unit", "witness")

    def __init__(self, hold: Hold, tensor: torch.Tensor, unit: int = 0) -> None:
        self.hold = hold
        self.unit = unit
        """When it was saved: backward goes through units in reverse."""
        self.shape = Shape.of(tensor)
        self.witness = Witness(tensor)
        self._kind = tensor.type()

    def check(self) -> None:
        """See that it is what was saved.

        Raises:
            RuntimeError: it has been changed in place since. torch leaves this to us where there are hooks.
        """
        if self.witness.changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._kind} {list(self.shape.size)}] is at version {self.witness.now}; expected version "
                f"{self.witness.version} instead."
            )


def flat_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as bytes."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return made.set_(storage, 0, (storage.nbytes(),), (1,))
