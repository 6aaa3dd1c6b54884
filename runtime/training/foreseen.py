"""What is to be trained, and what a step of it would take on a machine: records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ...memory.requests import CHUNK
from ...scheduler.cost import CostModel
from ...scheduler.hardware import Hardware
from ...scheduler.plan import Plan
from ...scheduler.sizes import Bytes
from ...scheduler.stepload import StepLoad, StepPrediction, Updates
from .optimizers import OptimizerChoice
from .roomplan import TrainingRoom
from .run import Activations
from .wear import Wear, wear_of

STANDARD_NBYTES: Final = 600 * 10**12
"""What a drive of 1 TB for consumers is usually warranted for: shown where nothing is known of the machine's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """LoRA (Hu et al., 2021): what is trained instead of the weights."""

    rank: int
    targets: tuple[str, ...] = ()
    """Ends of the names of the linear layers that get them; all but the output layer where none is named."""
    dropout: float = 0.0
    """Of what goes into them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """What is to be trained, and how."""

    choice: OptimizerChoice
    batch: int
    """Sequences of a backward pass."""
    context: int
    """Tokens of each."""
    packed: bool = False
    """Whether they hold several documents, which positions keep apart."""
    accumulate: int = 1
    updates: Updates = "step"
    activations: Activations = "auto"
    """What becomes of them, as `prepare` has it."""
    adapters: Adapters | None = None

    @property
    def clips(self) -> bool:
        """Whether the norm of all gradients is clipped."""
        return self.choice.max_grad_norm is not None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context * self.accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingForecast:
    """What a step would take."""

    hardware: Hardware
    work: TrainingWork
    recompute: bool
    """Whether layers make their activations again in the step that is foreseen."""
    plan: Plan
    """Of the weights. Host memory includes what gradients and states need at least."""
    room: TrainingRoom
    """What gradients and states have of host memory."""
    load: StepLoad
    prediction: StepPrediction
    tensors: int
    """That are trained."""
    activations_nbytes: int
    """At most, on the tier that computes; with the framework's own."""
    activations: Bytes | None
    """By purpose; None where the model cannot be rehearsed."""
    decided: bool = False
    """Whether a run makes a plan for activations after its first forward."""
    moves_to_disk: bool = False
    """Whether some of them may go to disk by that."""
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.prediction.seconds

    @property
    def moves(self) -> bool:
        """Whether anything is read, written or copied, so that another machine could do it faster."""
        traffic = self.prediction.traffic
        return bool(traffic.read or traffic.written or traffic.to_device)

    @property
    def tokens_per_s(self) -> float:
        """That are trained on."""
        return self.work.tokens / self.seconds

    @property
    def binds(self) -> str:
        """What a step takes most of."""
        return self.prediction.binds

    @property
    def trained(self) -> int:
        """Parameters, counted as numbers."""
        return sum(block.elements for block in self.load.trained())

    @property
    def disk_nbytes(self) -> int:
        """Of drives, for as long as the run is kept: masters and states twice, so that the last commit stays whole."""
        return 2 * sum(block.states_nbytes for block in self.load.trained())

    @property
    def scratch_nbytes(self) -> int:
        """Of drives while it runs: weights that do not stay in memory, gradients that go to disk or may have to."""
        return sum(block.written_nbytes for block in self.load.trained()) + self.room.gradients_on_disk_nbytes

    @property
    def wear(self) -> Wear:
        """What steps and commits write to drives."""
        return replace(wear_of(self.load), activations_nbytes=None if self.moves_to_disk else 0)

    @property
    def begin_s(self) -> float:
        """Writing all masters, before the first step."""
        return CostModel(hardware=self.hardware).write_s(self.disk_nbytes / 2, CHUNK)

    @property
    def endurance_nbytes(self) -> int:
        """What may be written to all drives in their lives; 0 where it is not known of all."""
        known = [drive.endurance_nbytes for drive in self.hardware.drives]
        return sum(known) if all(known) else 0

    def steps_until(self, written: float) -> float:
        """Steps, of so many bytes, until that or STANDARD_NBYTES, where it is not known, has been written."""
        return (self.endurance_nbytes or STANDARD_NBYTES) / written
