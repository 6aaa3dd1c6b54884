"""What fine-tuning a model would take on a machine, from its config alone: where everything would lie, how long a step
would be, and what it would write.

As for a run without training (`runtime/foresight.py`): the model is built without weights and rehearsed without memory,
blocks are cut and placed by the planner that `prepare` uses, and the step is simulated (`scheduler/trainstep.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedModel

from ...memory.errors import DoesNotFitError, UsageError
from ...scheduler.cost import CostModel
from ...scheduler.hardware import Hardware
from ...scheduler.plan import Links, Plan
from ...scheduler.program import Program
from ...scheduler.sizes import Bytes, Training, Workload
from ...scheduler.stepload import StepLoad
from ...scheduler.trainstep import predict
from ...scheduler.updating import ON_CPU, UpdateShares
from ...scheduler.weighing import Weighing
from ..activations.store import LEAST_BUFFER, ActivationStore
from ..adapterbones import add_adapters
from ..experts.layers import fused_experts
from ..feeding import UnknownInputError, with_context
from ..foresight import Foresight, Room, device_name
from ..headroom import FRAMEWORK
from ..layout import Budgets, Changing, Layout
from ..planned import make_plan
from ..planning import Planner
from ..pretrained import outline
from ..programs import training_program
from ..recompute import segments_of
from ..rehearsal import TooLongError, make_fake
from ..sizing import measure_activations
from .activations import announced, kept_nbytes
from .adapters import changing_on
from .foreseen import Adapters, TrainingForecast, TrainingWork
from .headroom import moving_nbytes, norm_copy_nbytes
from .loads import StepSettings, load_of
from .preparing import arrays_of
from .room import changing, sizes_of, with_saves
from .roomplan import TrainingRoom, adapter_room, moves_activations, plan_room
from .run import Activations, Settings
from .savedcount import forward_saves
from .saves import ForwardSaves
from .selection import beside_blocks, shards_in
from .shards import Shard
from .trained import Trained, trained_as
from .updateshares import update_shares
from .weighed import weighing


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
        self._programs: dict[Workload, Program] = {}
        self._activations: dict[tuple[Workload, bool, bool], tuple[Bytes | None, tuple[str, ...]]] = {}
        self._saves: dict[Workload, ForwardSaves | None] = {}
        self.segments: Sequence[str] = segments_of(foresight.model)

    def _fake(self) -> PreTrainedModel:
        """The model as it will be trained, without values."""
        made = outline(self.foresight.name, dtype=self._dtype, trust_remote_code=self._trust)
        make_fake(made)
        given = self.adapters
        if given is None:
            for parameter in made.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        elif not add_adapters(made, rank=given.rank, targets=given.targets, dropout=given.dropout):
            named = f" named {', '.join(given.targets)}" if given.targets else ""
            raise UsageError(f"nothing would be trained: {type(made).__name__} has no linear layers{named}")
        return made

    def program(self, batch: int, context: int, *, packed: bool = False) -> Program:
        """The forward of a step.

        Raises:
            UsageError: it cannot be foreseen, for the model's inputs are not known or it loops over its tokens.
        """
        workload = self._workload(batch, context, packed)
        if workload not in self._programs:
            try:
                self._programs[workload] = training_program(self._plain, workload)
            except UnknownInputError as error:
                raise UsageError(f"how long a step takes cannot be foreseen: {error}") from error
            except TooLongError as error:
                raise UsageError(
                    f"how long a step takes cannot be foreseen: {type(self._plain).__name__} loops over its tokens; "
                    "--sizes --train says what it takes of memory"
                ) from error
            except Exception as error:  # a model's code may do anything that a tensor without values cannot
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                name = type(self._plain).__name__
                raise UsageError(
                    f"how long a step takes cannot be foreseen: the forward of {name} asks for values ({text})"
                ) from error
        return self._programs[workload]

    def _workload(self, batch: int, context: int, packed: bool) -> Workload:
        train: Training = "adamw" if self.adapters is None else "lora"
        return Workload(train=train, batch=batch, context=context, packed=packed)

    def activations(
        self, batch: int, context: int, *, packed: bool = False, again: bool, on_cpu: bool
    ) -> tuple[Bytes | None, tuple[str, ...]]:
        """What a backward pass holds beside weights and gradients; see `measure_activations`."""
        workload = self._workload(batch, context, packed)
        key = workload, again, on_cpu
        if key not in self._activations:
            if again and self._again is None:
                self._again = self._fake()
            model = self._again if again and self._again is not None else self._plain
            self._activations[key] = measure_activations(model, workload, again=again, on_cpu=on_cpu)
        return self._activations[key]

    def saves(self, batch: int, context: int, *, packed: bool = False) -> ForwardSaves | None:
        """What a forward leaves for backward; see `forward_saves`."""
        workload = self._workload(batch, context, packed)
        if workload not in self._saves:
            self._saves[workload] = forward_saves(self._plain, context=context, batch=batch, packed=packed)
        return self._saves[workload]

    @cached_property
    def trained(self) -> tuple[Trained, ...]:
        """What is trained, in the order of `parameters()`. Nothing looks at strides before there are weights."""
        named = self._plain.named_parameters()
        experts = fused_experts(self._plain)
        return tuple(trained_as(name, p, (), experts) for name, p in named if p.requires_grad)

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
        work, room = self.with_context(work), room or Room()
        if work.activations == "auto" and self._may_stay(hardware, work, room):
            try:  # as `prepare` decides: they are kept where all weights stay
                found = self._as(hardware, work, room, kept=True)
                if found.plan.resident and not found.decided:
                    return found
            except DoesNotFitError:
                pass
        return self._as(hardware, work, room, kept=work.activations == "keep")

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

    def _may_stay(self, hardware: Hardware, work: TrainingWork, room: Room) -> bool:
        """Whether all weights could stay where they are used, if it were not for activations."""
        budgets = self.foresight.budgets(hardware, room, FRAMEWORK)
        weights = self.foresight.weights_nbytes
        if budgets.device is not None:
            return weights <= budgets.device
        return weights + self._changing(hardware, work, "keep").own_nbytes <= budgets.host

    def _as(self, hardware: Hardware, work: TrainingWork, room: Room, *, kept: bool) -> TrainingForecast:
        """A step of which all activations are `kept`, or else what was asked for becomes of them."""
        on_cpu = hardware.gpu is None
        automatic = room.host is None or (room.device is None and not on_cpu)
        activations: Activations = "keep" if kept and automatic else work.activations
        again = not kept and activations != "offload" and bool(self.segments)
        held, notes = self._held(work, again=again or activations == "offload", on_cpu=on_cpu)
        largest = max((each.parameter.nbytes for each in self.trained), default=0)
        copied = norm_copy_nbytes((each.parameter for each in self.trained), separate=not on_cpu)
        transient = FRAMEWORK + largest + copied + (0 if held is None else held.total)
        saves = self.saves(work.batch, work.context, packed=work.packed)
        if activations == "offload" or (automatic and activations == "auto"):
            transient += moving_nbytes(saves)
        shares = self._shares(hardware, work, room)
        changing = self._changing(hardware, work, activations, saves, on_device=shares.any)
        step = self._weighed(hardware, work, saves) if on_cpu and activations == "auto" else None
        if not automatic:
            changing = replace(changing, weighing=step)
        budgets = self.foresight.budgets(hardware, room, transient)
        layout = self._layout(hardware, budgets, changing)
        settings = Settings(
            accumulate=work.accumulate, updates=work.updates, activations=activations, shares=shares, saves=saves
        )
        shards, shared = self._shared(layout, work, settings, saved_is_known=changing.saved_nbytes is not None)
        decided = moves_activations(layout, settings, frozen=self.adapters is not None)
        spared = step.spared_s(kept_nbytes(shared.activations_nbytes)) if step is not None and decided else 0.0
        load = self._load(hardware, work, layout, shards, shared, again=again, spared_s=spared / work.accumulate)
        plan, left_out = self._told(hardware, budgets, layout, settings, shared, counted=step is not None)
        found = TrainingForecast(
            hardware=hardware,
            work=work,
            recompute=again,
            plan=plan,
            room=shared,
            load=load,
            prediction=predict(load, CostModel(hardware=hardware, beside=True)),
            tensors=len(self.trained),
            activations_nbytes=transient,
            decided=decided,
            moves_to_disk=decided and self._may_go_to_disk(settings, shared),
            activations=held,
            notes=(*notes, *left_out),
        )
        _check_drives(found)
        return found

    def _weighed(self, hardware: Hardware, work: TrainingWork, saves: ForwardSaves | None) -> Weighing | None:
        """A step of all weights, as `prepare` weighs activations by it."""
        if self.adapters is not None:
            return None
        options = {"tokens": work.batch * work.context, "accumulate": work.accumulate}
        return weighing(self.foresight.model, saves, hardware, work.choice, early=work.updates == "backward", **options)

    def _layout(self, hardware: Hardware, budgets: Budgets, changing: Changing) -> Layout:
        model = self.foresight.model
        return Planner(
            model,
            self.foresight.backing,
            budgets,
            buffers_nbytes=sum(buffer.nbytes for buffer in model.buffers()),
            keep_skew=hardware.gpu is None or hardware.emulated,
            changing=changing,
        ).best()

    def _told(
        self,
        hardware: Hardware,
        budgets: Budgets,
        layout: Layout,
        settings: Settings,
        room: TrainingRoom,
        *,
        counted: bool,
    ) -> tuple[Plan, Sequence[str]]:
        """The plan, with what `prepare` puts into it; and what of it is not in the step that is foreseen."""
        links = Links(disk_read=budgets.disk_rate, h2d=budgets.link_rate if hardware.link else None)
        plan = make_plan(layout, device_name(hardware), budgets, links, self.foresight.weights_nbytes)
        plan = room.told(plan, layout)
        if not moves_activations(layout, settings, frozen=self.adapters is not None):
            return plan, ()
        layers, some = bool(self.segments), room.activations_nbytes >= ActivationStore.buffers_nbytes(LEAST_BUFFER)
        note = announced(settings, layers=layers, room=some)
        return replace(plan, notes=(*plan.notes, note)), _left_out(settings, held=layers and some, counted=counted)

    def _may_go_to_disk(self, settings: Settings, room: TrainingRoom) -> bool:
        """Whether activations that a plan decides about have buffers on the way there."""
        some = room.activations_nbytes >= ActivationStore.buffers_nbytes(LEAST_BUFFER)
        return some and (settings.activations == "offload" or bool(self.segments))

    def _held(self, work: TrainingWork, *, again: bool, on_cpu: bool) -> tuple[Bytes | None, tuple[str, ...]]:
        """What a backward pass holds, and notes."""
        held, notes = self.activations(work.batch, work.context, packed=work.packed, again=again, on_cpu=on_cpu)
        if held is None and again:  # transformers' own checkpointing, which the rehearsal uses, is not there
            held, notes = self.activations(work.batch, work.context, packed=work.packed, again=False, on_cpu=on_cpu)
            notes = (*notes, "activations made again are counted as if they were kept: they cannot be rehearsed")
        return held, notes

    def _shared(
        self, layout: Layout, work: TrainingWork, settings: Settings, *, saved_is_known: bool
    ) -> tuple[tuple[Shard, ...], TrainingRoom]:
        """The shards, and what stays in memory of them and of gradients: as `prepare` shares it out."""
        arrays = arrays_of(work.choice)
        if self.adapters is not None:
            shards = beside_blocks(self.trained)
            return shards, adapter_room(layout, self.trained, shards, settings, arrays=arrays)
        shards = shards_in(layout, self.trained)
        return shards, plan_room(layout, self.trained, shards, settings, arrays=arrays, saved_is_known=saved_is_known)

    def _load(
        self,
        hardware: Hardware,
        work: TrainingWork,
        layout: Layout,
        shards: Sequence[Shard],
        room: TrainingRoom,
        *,
        again: bool,
        spared_s: float,
    ) -> StepLoad:
        """What a step consists of."""
        return load_of(
            layout,
            self.program(work.batch, work.context, packed=work.packed),
            CostModel(hardware=hardware, beside=True),
            trained=self.trained,
            shards=shards,
            room=room,
            settings=StepSettings(
                choice=work.choice,
                accumulate=work.accumulate,
                updates=work.updates,
                segments=self.segments if again else (),
                spared_s=spared_s,
            ),
        )

    def _shares(self, hardware: Hardware, work: TrainingWork, room: Room) -> UpdateShares:
        """What a device apart would update: as `prepare` decides. Adapters are the CPU's."""
        gpu = hardware.gpu
        if gpu is None or self.adapters is not None:
            return ON_CPU
        device_nbytes = gpu.memory_nbytes if room.device is None else room.device
        itemsize = self.foresight.model.dtype.itemsize
        return update_shares("auto", hardware, work.choice, itemsize=itemsize, device_nbytes=device_nbytes)

    def _changing(
        self,
        hardware: Hardware,
        work: TrainingWork,
        activations: Activations,
        saves: ForwardSaves | None = None,
        *,
        on_device: bool = False,
    ) -> Changing:
        """Memory that training needs at least, and what it could use, as `prepare` counts it; of a device apart where
        that updates some (`on_device`)."""
        arrays = arrays_of(work.choice)
        if self.adapters is None:
            return changing(
                *sizes_of(self.foresight.model),
                accumulate=work.accumulate,
                early=work.updates == "backward",
                arrays=arrays,
                separate=hardware.gpu is not None,
                on_device=on_device,
                activations=activations,
                saves=saves,
            )
        found = changing_on(
            [each.parameter for each in self.trained],
            separate=hardware.gpu is not None,
            emulated=hardware.emulated,
            arrays=arrays,
            accumulate=work.accumulate,
            activations=activations,
        )
        return with_saves(found, saves, activations)


def _left_out(settings: Settings, *, held: bool, counted: bool) -> Sequence[str]:
    """What is not in the step that is foreseen, of activations that a plan decides about; `counted`: products are."""
    if settings.activations == "offload":
        return ("what activations pass on their way to memory and disk, and back, is not in the time foreseen",)
    if not held:
        return ()
    if counted:
        return ("foreseen with as many results of products held as have room, all else of layers made again",)
    return ("foreseen as if layers made all their activations again: what a run holds of them makes it faster",)


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
