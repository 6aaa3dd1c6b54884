"""What fine-tuning a model would take on a machine, from its config alone: where everything would lie, how long a step
would be, and what it would write.

As for a run without training (`runtime/foresight.py`): the model is built without weights and rehearsed without memory,
blocks are cut and placed by the planner that `prepare` uses, and the step is simulated (`scheduler/trainstep.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from transformers import PreTrainedModel

from ...memory.errors import DoesNotFitError, UsageError
from ...scheduler.cost import CostModel
from ...scheduler.hardware import Hardware
from ...scheduler.plan import Links, Plan
from ...scheduler.program import Program
from ...scheduler.sizes import Bytes, Training, Workload
from ...scheduler.stepload import StepLoad, StepPrediction, Updates
from ...scheduler.trainstep import REQUEST, predict
from ...scheduler.updating import ON_CPU, UpdateShares, choose
from ..feeding import UnknownInputError, with_context
from ..foresight import Foresight, Room, device_name
from ..headroom import FRAMEWORK
from ..layout import Changing
from ..planned import make_plan
from ..planning import Planner
from ..pretrained import outline
from ..programs import training_program
from ..recompute import segments_of
from ..rehearsal import TooLongError, make_fake
from ..sizing import add_adapters, measure_activations
from .deviceupdates import DeviceUpdates
from .loads import Learned, StepSettings, load_of, update_work
from .optimizers import OptimizerChoice
from .room import changing
from .shards import ELEMENTS

STANDARD_NBYTES: Final = 600 * 10**12
"""What a drive of 1 TB for consumers is usually warranted for: shown where nothing is known of the machine's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """LoRA (Hu et al., 2021): what is trained instead of the weights."""

    rank: int
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get them; all of the stacks where none is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """What is to be trained, and how."""

    choice: OptimizerChoice
    batch: int
    """Sequences of a backward pass."""
    context: int
    """Tokens of each."""
    accumulate: int = 1
    updates: Updates = "step"
    recompute: bool | None = None
    """Whether layers make their activations again; None: where weights are streamed."""
    adapters: Adapters | None = None

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
    plan: Plan
    """Of the weights. Host memory includes what gradients and states need at least."""
    load: StepLoad
    prediction: StepPrediction
    activations_nbytes: int
    """At most, on the tier that computes; with the framework's own."""
    activations: Bytes | None
    """By purpose; None where the model cannot be rehearsed."""
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
        """Of drives while it runs: weights that do not stay in memory, gradients that go to disk, and a place for each
        that would have to where updates begin early."""
        early = self.work.updates == "backward" and self.work.accumulate == 1
        return sum(
            (0 if block.in_memory else block.weights_nbytes) + (block.kept_nbytes if block.spilled or early else 0)
            for block in self.load.trained()
        )

    @property
    def begin_s(self) -> float:
        """Writing all masters, before the first step."""
        return CostModel(hardware=self.hardware).write_s(self.disk_nbytes / 2, REQUEST)

    @property
    def endurance_nbytes(self) -> int:
        """What may be written to all drives in their lives; 0 where it is not known of all."""
        known = [drive.endurance_nbytes for drive in self.hardware.drives]
        return sum(known) if all(known) else 0

    @property
    def steps_in_life(self) -> float | None:
        """Steps until so much has been written, or STANDARD_NBYTES where it is not known; None where nothing is."""
        written = self.prediction.traffic.written
        return (self.endurance_nbytes or STANDARD_NBYTES) / written if written else None


class TrainingForesight:
    """One model that is to be trained in one way, to be foreseen on any number of machines.

    Args:
        foresight: Of the model.
        dtype: That it was made with.
        trust_remote_code: Likewise.
        adapters: Train these, and not the weights.
    """

    def __init__(
        self, foresight: Foresight, *, dtype: str = "auto", trust_remote_code: bool = False, adapters: Adapters | None
    ) -> None:
        self.foresight = foresight
        self.adapters = adapters
        self._dtype, self._trust = dtype, trust_remote_code
        self._plain = self._fake()
        self._again: PreTrainedModel | None = None
        """A model of its own, for what makes activations again stays so."""
        self._programs: dict[tuple[int, int], Program] = {}
        self._activations: dict[tuple[int, int, bool, bool], tuple[Bytes | None, tuple[str, ...]]] = {}
        self.segments: Sequence[str] = segments_of(foresight.model)

    def _fake(self) -> PreTrainedModel:
        """The model as it will be trained, without values."""
        made = outline(self.foresight.name, dtype=self._dtype, trust_remote_code=self._trust)
        make_fake(made)
        if self.adapters is not None:
            add_adapters(made, self.adapters.rank, self.adapters.targets)
        for parameter in made.parameters():
            parameter.requires_grad_(parameter.requires_grad if self.adapters else parameter.is_floating_point())
        if not any(parameter.requires_grad for parameter in made.parameters()):
            named = ", ".join(self.adapters.targets) if self.adapters and self.adapters.targets else "a stack of layers"
            raise UsageError(f"nothing would be trained: {type(made).__name__} has no linear layers in {named}")
        return made

    def program(self, batch: int, context: int) -> Program:
        """The forward of a step.

        Raises:
            UsageError: it cannot be foreseen, for the model's inputs are not known or it loops over its tokens.
        """
        key = batch, context
        if key not in self._programs:
            workload = Workload(train=self._kind, batch=batch, context=context)
            try:
                self._programs[key] = training_program(self._plain, workload)
            except UnknownInputError as error:
                raise UsageError(f"how long a step takes cannot be foreseen: {error}") from error
            except TooLongError as error:
                raise UsageError(
                    f"how long a step takes cannot be foreseen: {type(self._plain).__name__} loops over its tokens; "
                    "--sizes --train says what it takes of memory"
                ) from error
        return self._programs[key]

    @property
    def _kind(self) -> Training:
        return "adamw" if self.adapters is None else "lora"

    def activations(
        self, batch: int, context: int, *, again: bool, on_cpu: bool
    ) -> tuple[Bytes | None, tuple[str, ...]]:
        """What a backward pass holds beside weights and gradients; see `measure_activations`."""
        key = batch, context, again, on_cpu
        if key not in self._activations:
            if again and self._again is None:
                self._again = self._fake()
            model = self._again if again and self._again is not None else self._plain
            workload = Workload(train=self._kind, batch=batch, context=context)
            self._activations[key] = measure_activations(model, workload, again=again, on_cpu=on_cpu)
        return self._activations[key]

    def learned(self) -> Learned:
        """What is trained."""
        itemsize = self.foresight.model.dtype.itemsize
        if self.adapters is None:
            elements = {n: p.numel() for n, p in self.foresight.model.named_parameters() if p.is_floating_point()}
            return Learned(elements=elements, itemsize=itemsize)
        beside = sum(parameter.numel() for parameter in self._plain.parameters() if parameter.requires_grad)
        return Learned(elements={}, itemsize=itemsize, beside=beside)

    def forecast(self, hardware: Hardware, work: TrainingWork, *, room: Room | None = None) -> TrainingForecast:
        """Plan the model and simulate a step.

        Raises:
            DoesNotFitError: some tier is too small; the message says how much is needed.
            UsageError: the machine has no drive, or the model cannot be foreseen.
        """
        if not hardware.drives:
            raise UsageError(
                f"{hardware.name}: no drive is known, which masters and states lie on: give it one under drives"
            )
        work = self.with_context(work)
        if work.recompute is not None:
            return self._as(hardware, work, room, again=work.recompute)
        if self._may_stay(hardware, work, room):  # as `prepare` decides: activations are kept where all weights stay
            try:
                found = self._as(hardware, work, room, again=False)
                if found.plan.resident:
                    return found
            except DoesNotFitError:
                pass
        return self._as(hardware, work, room, again=True)

    def with_context(self, work: TrainingWork) -> TrainingWork:
        """The work with a context that the model has positions for.

        Raises:
            UsageError: it asks for more.
        """
        context = with_context(self.foresight.model, Workload(batch=work.batch, context=work.context)).context
        return replace(work, context=context)

    def with_adapters(self, adapters: Adapters) -> TrainingForesight:
        """The same model, with adapters that are trained in the place of what is trained here."""
        return TrainingForesight(self.foresight, dtype=self._dtype, trust_remote_code=self._trust, adapters=adapters)

    def _may_stay(self, hardware: Hardware, work: TrainingWork, room: Room | None) -> bool:
        """Whether all weights could stay where they are used, if it were not for activations."""
        budgets = self.foresight.budgets(hardware, room or Room(), FRAMEWORK)
        weights = self.foresight.weights_nbytes
        if budgets.device is not None:
            return weights <= budgets.device
        return weights + self._changing(work, separate=False).own_nbytes <= budgets.host

    def _as(self, hardware: Hardware, work: TrainingWork, room: Room | None, *, again: bool) -> TrainingForecast:
        on_cpu = hardware.gpu is None
        again = again and bool(self.segments)
        held, notes = self.activations(work.batch, work.context, again=again, on_cpu=on_cpu)
        if held is None and again:  # transformers' own checkpointing, which the rehearsal uses, is not there
            held, notes = self.activations(work.batch, work.context, again=False, on_cpu=on_cpu)
            notes = (*notes, "activations made again are counted as if they were kept: they cannot be rehearsed")
        largest = max((p.nbytes for p in self._plain.parameters() if p.requires_grad), default=0)
        transient = FRAMEWORK + largest + (0 if held is None else held.total)
        model = self.foresight.model
        budgets = self.foresight.budgets(hardware, room or Room(), transient)
        cost = CostModel(hardware=hardware)
        shares = self._shares(work, cost, budgets.device)
        layout = Planner(
            model,
            self.foresight.backing,
            budgets,
            buffers_nbytes=sum(buffer.nbytes for buffer in model.buffers()),
            keep_skew=on_cpu or hardware.emulated,
            changing=self._changing(work, separate=budgets.device is not None, on_device=shares.any),
        ).best()
        load = load_of(
            layout,
            self.program(work.batch, work.context),
            cost,
            learned=self.learned(),
            settings=StepSettings(
                choice=work.choice,
                accumulate=work.accumulate,
                updates=work.updates,
                shares=shares,
                segments=self.segments if again else (),
            ),
            room_nbytes=layout.granted_nbytes,
            passing_nbytes=self._passing_nbytes(work, separate=budgets.device is not None),
        )
        links = Links(disk_read=budgets.disk_rate, h2d=budgets.link_rate if hardware.link else None)
        found = TrainingForecast(
            hardware=hardware,
            work=work,
            recompute=again,
            plan=make_plan(layout, device_name(hardware), budgets, links, self.foresight.weights_nbytes),
            load=load,
            prediction=predict(load, cost),
            activations_nbytes=transient,
            activations=held,
            notes=notes,
        )
        _check_drives(found)
        return found

    def _shares(self, work: TrainingWork, cost: CostModel, device_nbytes: int | None) -> UpdateShares:
        """What the device would update: as `prepare` decides. Adapters are the CPU's."""
        if cost.hardware.gpu is None or self.adapters is not None:
            return ON_CPU
        kept = update_work(work.choice)
        arrays = StepSettings(choice=work.choice, accumulate=1, updates=work.updates, segments=()).arrays
        return choose(
            "auto",
            cost,
            kept,
            arrays=arrays,
            itemsize=2,
            shard_elements=ELEMENTS,
            needed_nbytes=DeviceUpdates.needed_nbytes(ELEMENTS, arrays),
            device_nbytes=device_nbytes,
        )

    def _passing_nbytes(self, work: TrainingWork, *, separate: bool) -> int:
        """Of what training needs at least, what gradients pass through: the rest of them is what it could have more."""
        early = work.updates == "backward"
        if self.adapters is not None or (early and work.accumulate == 1):
            return 0
        weights = [parameter.nbytes for parameter in self.foresight.model.parameters()]
        every = (2 if work.accumulate > 1 else 1) * sum(weights)
        needs = changing(weights, accumulate=work.accumulate, early=early, arrays=0, separate=separate)
        return every - needs.more_nbytes

    def _changing(self, work: TrainingWork, *, separate: bool, on_device: bool = False) -> Changing:
        """Memory that training needs at least; `separate`: beside a device apart, which updates some (`on_device`)."""
        weights = [parameter.nbytes for parameter in self.foresight.model.parameters()]
        if self.adapters is None:
            settings = StepSettings(choice=work.choice, accumulate=1, updates=work.updates, segments=())
            early = work.updates == "backward"
            return changing(
                weights,
                accumulate=work.accumulate,
                early=early,
                arrays=settings.arrays,
                separate=separate,
                on_device=on_device,
            )
        learned = self.learned()
        each = learned.beside * learned.itemsize
        settings = StepSettings(choice=work.choice, accumulate=1, updates="step", segments=())
        states = 4 * settings.arrays * learned.beside
        gradients = 4 * learned.beside if work.accumulate > 1 else each
        adapters = [p.nbytes for p in self._plain.parameters() if p.requires_grad]
        passing = changing(adapters, accumulate=1, early=True).own_nbytes
        whole = changing(weights, accumulate=1, early=True)
        return Changing(own_nbytes=each + gradients + states + passing, block_nbytes=whole.block_nbytes)


def _check_drives(found: TrainingForecast) -> None:
    """See that the drives are large enough, where it is known how large they are.

    Raises:
        DoesNotFitError: they are not.
    """
    sizes = [drive.capacity_nbytes for drive in found.hardware.drives]
    needed = found.disk_nbytes + found.scratch_nbytes
    if all(sizes) and needed > sum(sizes):
        raise DoesNotFitError(
            f"{found.hardware.name}: the run takes {needed} bytes of its drives ({needed / 2**30:.1f} GiB: masters and "
            f"states twice, and scratch files), which have {sum(sizes)}: add a drive, or train adapters (--lora r=16)",
            tier="disk",
            needed_nbytes=needed,
            available_nbytes=sum(sizes),
        )
