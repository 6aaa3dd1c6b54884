"""What one step of training consists of, as figures: blocks with what belongs to them, and the order of their uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Home = Literal["device", "host", "disk"]
Updates = Literal["step", "backward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBlock:
    """One block of weights, with the gradients, masters and states of those that are trained in it. Sizes in bytes."""

    id: int
    home: Home
    """Where its weights lie between two uses. device: there, and changed ones come to it by way of the disk, or of host
    memory (`homed`)."""
    read_nbytes: int
    """What reading its weights moves, padding included."""
    weights_nbytes: int
    written_nbytes: int = 0
    """What an update of it writes of them: nothing where they stay in host memory, or lie beside frozen ones."""
    elements: int = 0
    """That are trained; 0 where it is frozen."""
    tensors: int = 1
    """That these belong to: each has a gradient of its own, and is updated by itself."""
    states_nbytes: int = 0
    """Masters and the optimizer's states of these."""
    states_moved_nbytes: int = 0
    """Of them, those that every update reads and writes; the rest stays in host memory."""
    gradient_nbytes: int = 0
    """Of one backward pass, in the dtype of the weights."""
    kept_nbytes: int = 0
    """The same as it is kept until the update: in fp32 where several passes are added up."""
    spilled_nbytes: int = 0
    """Of that, what goes to disk until then."""
    spilled_read_nbytes: int = 0
    """What reading that moves, whole pages; writing it moves as much."""
    homed: bool = False
    """Of one that stays on the device: whether host memory has its weights as well, which change there first."""
    elements_there: int = 0
    """Of those that are trained, what a device apart updates; the CPU has the rest."""

    @property
    def in_memory(self) -> bool:
        """Whether new weights need not go to disk."""
        return self.home == "host" or self.homed

    @property
    def norm_nbytes(self) -> int:
        """Read and written for the norm of its gradients: they are made fp32 for it, where they are not."""
        return self.kept_nbytes + (0 if self.kept_nbytes >= 4 * self.elements else 8 * self.elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockUse:
    """A stretch of computing for which the same blocks are lent."""

    blocks: tuple[int, ...]
    forward_s: float
    """By itself, on the processor that computes."""
    again_s: float
    """What of it is computed again in backward: a segment ends with the last tensor that it saves."""
    backward_s: float
    saved: bool
    """Whether backward asks for the blocks again: products do, lookups do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateWork:
    """What an optimizer does to its arrays, on the CPU."""

    nbytes: float
    """Read and written per element, over all operations; most of it in the processor's caches."""
    operations: int
    """That follow each other on every sub-chunk."""
    elements: int
    """Of a sub-chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """A step, as far as time is concerned."""

    blocks: Mapping[int, LoadedBlock]
    uses: tuple[BlockUse, ...]
    """Of one forward."""
    segments: tuple[tuple[int, int], ...] = ()
    """Stretches of `uses` (first, one behind the last) that run again in backward, in order and apart from each other;
    none where activations are kept."""
    slots: int
    """Of the ring that weights pass through on the tier that computes."""
    host_slots: int = 0
    """The same of the host's, on the way to a device apart."""
    separate: bool
    """Whether a device computes that is apart from the CPU, which updates."""
    accumulate: int = 1
    updates: Updates = "step"
    arrays: int
    """Of fp32: masters and states."""
    update: UpdateWork
    shard_elements: int
    """Of what is read, updated and written at a time, at most."""
    buffers: int
    """Shards under way at a time."""
    behind: int
    """Blocks that wait for their update before backward waits for that, where updates begin in backward."""
    leaving_nbytes: int
    """Of gradients on a device apart that may wait for their copies, before backward waits for one."""
    small: int = 0
    """The block of small tensors, which is updated before all others, while the step waits."""

    def trained(self) -> list[LoadedBlock]:
        """Blocks that change."""
        return [block for block in self.blocks.values() if block.elements]

    def held_nbytes(self, home: Home) -> int:
        """Weights that lie on a tier: of those with a home in host memory on both."""
        found = (block for block in self.blocks.values() if block.home == home or (block.homed and home == "host"))
        return sum(block.weights_nbytes for block in found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that one step moves."""

    weights_read: float = 0.0
    weights_written: float = 0.0
    states_read: float = 0.0
    states_written: float = 0.0
    gradients_read: float = 0.0
    gradients_written: float = 0.0
    to_device: float = 0.0
    from_device: float = 0.0

    @property
    def read(self) -> float:
        """From drives."""
        return self.weights_read + self.states_read + self.gradients_read

    @property
    def written(self) -> float:
        """To drives: their wear."""
        return self.weights_written + self.states_written + self.gradients_written


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPrediction:
    """How a step would go, once orders are learned and caches are warm."""

    seconds: float
    """From one `step()` to the next."""
    forward_s: float
    """Of all passes together, waiting included; likewise the others."""
    backward_s: float
    update_s: float
    """What `step()` takes before it returns: the norm, the small tensors, and what an update before it still had to
    do. The rest of the update goes on beside the next forward, or went on beside backward."""
    busy_s: Mapping[str, float]
    """By resource: what a step takes of it by itself."""
    traffic: Traffic

    @property
    def binds(self) -> str:
        """What the step takes most of."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])
