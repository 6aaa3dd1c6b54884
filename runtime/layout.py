"""A layout: blocks, which of them stay where, and the rings that the others pass through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ..memory.image import DeviceImage, Image
from ..scheduler.residency import Residency
from ..scheduler.weighing import Before, Weighing
from .backing import Portion
from .experts.placed import PlacedExperts
from .phases import ONCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bytes of each tier that the model may take, and the rates that weigh them against each other."""

    host: int
    device: int | None
    """None where device and host are one tier."""
    disk_rate: float
    link_rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Changing:
    """What it takes to train."""

    own_nbytes: int
    """Host memory beside the weights, at least: gradients that cannot go to disk, and what all else passes through."""
    block_nbytes: int
    """Blocks are no larger, but for parameters that are: each is put together in host memory before it is written."""
    moving_nbytes: int = 0
    """Of that, what is only taken where some weights do not stay in host memory."""
    more_nbytes: int = 0
    """What could be kept in host memory beyond that, if there is room: all gradients, all states."""
    limit_nbytes: int | None = None
    """Cut by this and no other: a run that goes on has states that lie by block, under whatever budgets."""
    own_device_nbytes: int = 0
    """Memory of a device apart, likewise."""
    saved_nbytes: int | None = 0
    """What a forward saves for backward, that may go to what is left of host memory; None where it is not known, and
    counts as much as the weights."""
    buffers_nbytes: int = 0
    """Of the buffers that it would pass through on its way to disk, at most."""
    weighing: Weighing | None = None
    """Of a step: whether activations have room before weights. None where weights come first."""
    frozen: bool = False
    """Whether weights in blocks only pass on gradients: what is trained (adapters) lies beside them, in no block."""

    @property
    def weights_change(self) -> bool:
        """Whether those in blocks do."""
        return not self.frozen


Trains = Callable[[Collection[int], int], Changing]
"""Says so, from the bytes of each weight, and of the widest element of any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """One block."""

    id: int
    name: str
    portions: tuple[Portion, ...]
    image: Image
    device_image: DeviceImage | None

    @property
    def front_nbytes(self) -> int:
        """Bytes of the slot that the consumer leases."""
        return self.image.nbytes if self.device_image is None else self.device_image.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A complete draft."""

    blocks: tuple[Draft, ...]
    """In definition order. Block 0 holds the small tensors and is always resident."""
    leases: Mapping[str, tuple[int, ...]]
    """Blocks that each module's forward leases."""
    expected: Mapping[str, tuple[int, ...]]
    """The same with the pieces of tables: what the first run is expected to use, in definition order."""
    uses: Mapping[int, int]
    """How many modules use each block, where it is more than one: an embedding that encoder and decoder share."""
    seldom: frozenset[int]
    """Blocks that are used once per answer, not once per token."""
    tables: Mapping[str, tuple[int, ...]]
    """Pieces of each parameter served by rows."""
    front: Residency
    back: Residency | None
    spare_slots: int
    """Slots beyond what nested forwards and one prefetch need."""
    staging_nbytes: int
    own_host_nbytes: int
    """Host memory besides the arena: staging and buffers."""
    own_device_nbytes: int = 0
    """Likewise of a device apart."""
    training_nbytes: int = 0
    """Of these, what training has for gradients, states, and what they pass through."""
    granted_nbytes: int = 0
    """Of that, what is more than it needs: room that weights have left."""
    saved_nbytes: int = 0
    """Of that, what activations could use at most, with their buffers."""
    before: Before | None = None
    """Of what is granted, what activations have before weights, and before gradients that could go to disk."""
    all_granted: bool = False
    """Whether that is all that training, activations included, could use."""
    limit_nbytes: int = 0
    """What parameters were cut by: blocks are no larger, but for parameters that are."""
    token_s: float | None = None
    """What a token takes where blocks were placed by that; None where bytes were what counted."""
    experts: PlacedExperts | None = None
    """Experts that are blocks of their own, the last of `blocks`; None where those of a layer are streamed together, as
    all else is."""
    on_cpu: Mapping[int, int] = field(default_factory=dict)
    """Of blocks that stay in the host tier of a separate device: calls of fewer rows than this are computed there."""

    @property
    def resident(self) -> bool:
        """Whether nothing is ever streamed."""
        return not self.front.slots and not self.tables and self.experts is None

    def streamed(self) -> list[Draft]:
        """Blocks that do not stay on the tier that computes."""
        return [block for block in self.blocks if block.id not in self.front.resident]

    def on_disk(self) -> list[Draft]:
        """Blocks that stay nowhere."""
        kept = self.front.resident | (self.back.resident if self.back else frozenset())
        return [block for block in self.blocks if block.id not in kept]

    @property
    def disk_nbytes(self) -> int:
        """Bytes read from disk per sweep in which each module is called once, for one token, as far as experts go."""
        experts = 0 if self.experts is None else round(self.experts.read_per_token)
        return experts + sum(
            self.uses.get(block.id, 1) * block.image.read_nbytes
            for block in self.on_disk()
            if not self.is_expert(block)
        )

    @property
    def link_nbytes(self) -> int:
        """Bytes copied to the device per sweep."""
        if self.back is None:
            return 0
        return round(
            sum(
                (self.per_token(block) if self.is_expert(block) else self.uses.get(block.id, 1))
                * block.image.data_nbytes
                for block in self.streamed()
            )
        )

    def is_expert(self, block: Draft) -> bool:
        """Whether a block is an expert's."""
        return self.experts is not None and block.id >= self.experts.first

    def per_token(self, block: Draft) -> float:
        """How often a block is used per token; of an expert how often it is brought to where it is computed."""
        if self.experts is not None and (used := self.experts.uses_of(block.id)) is not None:
            return used
        return self.uses.get(block.id, 1) * (ONCE if block.id in self.seldom else 1.0)

    def reads_per_token(self, block: Draft) -> float:
        """How often a block on disk is read per token."""
        if self.experts is not None and (read := self.experts.reads_of(block.id)) is not None:
            return read
        return self.per_token(block)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return self.own_host_nbytes + (self.back or self.front).nbytes + self.expert_host_nbytes

    @property
    def expert_host_nbytes(self) -> int:
        """Bytes of host memory that slots of experts take."""
        if self.experts is None:
            return 0
        return self.experts.host_nbytes if self.back is not None else self.experts.nbytes

    @property
    def expert_device_nbytes(self) -> int:
        """Bytes of a device apart that they take."""
        return 0 if self.experts is None or self.back is None else self.experts.nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory that it takes."""
        return self.own_device_nbytes + self.front.nbytes + self.expert_device_nbytes if self.back else 0
