"""Everything that trains one model, put together around a store, in the room that was decided on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ...kernels.optimizer import Optimizer
from ...kernels.scratch import Scratch
from ...memory.arena import AnyArena
from ...memory.scratch import Scratch as ScratchFolder
from ...memory.store import BlockStore
from ...memory.trim import map_alone
from ..build import Machinery
from ..launch import scratch_files
from .adapterweights import AdapterWeights
from .blockchanges import BlockChanges
from .catchup import CatchUp
from .departures import Departures
from .deviceupdates import DeviceUpdates
from .gradientroom import GradientPool, GradientRoom
from .gradients import Gradients
from .intake import GradientIntake
from .owing import Owing
from .pipeline import ShardPipeline
from .room import waiting_blocks
from .roomplan import TrainingRoom
from .run import Settings
from .shards import Shard, blocks_of
from .spill import GradientSpill
from .trained import Trained
from .training import Training
from .updater import Updater
from .weights import TrainedWeights, Weights


def assemble(
    machinery: Machinery,
    trained: Sequence[Trained],
    shards: Sequence[Shard],
    store: BlockStore,
    kernel: Optimizer[Any],
    scratches: Sequence[ScratchFolder],
    settings: Settings,
    room: TrainingRoom,
    *,
    arrays: int,
    counts: Sequence[int] = (),
) -> Training:
    """Put it together.

    Args:
        machinery: What runs the model.
        trained: What is trained.
        shards: Of these.
        store: Where masters and states lie.
        kernel: The optimizer's mathematics.
        scratches: Folders for what is moved in a step; none where nothing is.
        settings: Of the run.
        room: What stays in host memory.
        arrays: Of each shard.
        counts: How many updates each parameter has had.

    Raises:
        DoesNotFitError: a tier has less than was planned. What was made until then is given back.
    """
    map_alone()
    with ExitStack() as made:
        names = [each.name for each in trained]
        spill = _spill(machinery, names, shards, scratches, room, made)
        pipeline = ShardPipeline(
            store=store,
            engine=machinery.engine,
            shards=shards,
            arrays=arrays,
            kept=room.resident,
            beside_nbytes=0 if spill is None else max(spill.beside_nbytes(shard) for shard in shards),
            make_arena=lambda nbytes, tier: machinery.device.host_arena(nbytes, tier=tier),
        )
        made.callback(pipeline.close)
        weights = _weights(machinery, trained, scratches, pipeline)
        made.callback(weights.close)
        intake = _intake(machinery, trained, shards, settings, room, spill, made)
        _count(machinery, pipeline, intake)
        gradients = Gradients(trained, intake, most=settings.accumulate)
        made.callback(gradients.close)
        changes = BlockChanges(
            executor=machinery.executor,
            shards=shards,
            names=names,
            weights=weights,
            kernel=kernel,
            landed=intake.wait,
            spill=spill,
            device=_device_updates(machinery, kernel, shards, room, arrays=arrays),
            on_device=room.on_device,
        )
        owing = _owing(machinery, trained, shards, settings, room, weights, spill, arrays=arrays)
        updater = _updater(machinery, shards, pipeline, changes, intake, owing)
        training = Training(
            machinery=machinery,
            trained=trained,
            gradients=gradients,
            shards=shards,
            pipeline=pipeline,
            weights=weights,
            updater=updater,
            behind=room.behind,
            counts=counts,
            catch_up=None if owing is None else CatchUp(machinery, trained, owing, updater),
        )
        made.pop_all()
        return training


def _updater(
    machinery: Machinery,
    shards: Sequence[Shard],
    pipeline: ShardPipeline,
    changes: BlockChanges,
    intake: GradientIntake,
    owing: Owing | None,
) -> Updater:
    return Updater(
        executor=machinery.executor,
        shards=shards,
        pipeline=pipeline,
        changes=changes,
        used=intake.release,
        owing=owing,
    )


def _owing(
    machinery: Machinery,
    trained: Sequence[Trained],
    shards: Sequence[Shard],
    settings: Settings,
    room: TrainingRoom,
    weights: Weights,
    spill: GradientSpill | None,
    *,
    arrays: int,
) -> Owing | None:
    """Which shards of experts may wait until somebody needs them; None where none may.

    Beside a device apart, with updates that backward begins, a gradient need not be there yet when its update is.
    """
    if not isinstance(weights, TrainedWeights) or (machinery.device.separate and settings.updates == "backward"):
        return None
    moving = {shard.id for shard in shards}.difference(room.resident)
    owing = Owing(trained=trained, shards=shards, moving=moving, arrays=arrays, home=weights, spill=spill)
    if spill is not None:
        spill.watched = frozenset(owing.parameters)
    return owing if owing.parameters else None


def _spill(
    machinery: Machinery,
    names: Sequence[str],
    shards: Sequence[Shard],
    scratches: Sequence[ScratchFolder],
    room: TrainingRoom,
    made: ExitStack,
) -> GradientSpill | None:
    """Where gradients go that have no place of their own; `made` gives it back."""
    if not room.spilled:
        return None
    paths = scratch_files(scratches, "gradients.bin")
    spill = GradientSpill(names, room.spilled, shards, itemsizes=room.itemsizes, engine=machinery.engine, paths=paths)
    made.callback(spill.close)
    return spill


def _weights(
    machinery: Machinery, trained: Sequence[Trained], scratches: Sequence[ScratchFolder], pipeline: ShardPipeline
) -> Weights:
    """Where new weights go."""
    if machinery.trains:
        return TrainedWeights(machinery, scratch_files(scratches, "weights.bin"), pipeline.watch)
    return AdapterWeights(trained)


def _intake(
    machinery: Machinery,
    trained: Sequence[Trained],
    shards: Sequence[Shard],
    settings: Settings,
    room: TrainingRoom,
    spill: GradientSpill | None,
    made: ExitStack,
) -> GradientIntake:
    """What takes gradients in; `made` gives back what there is of it, where the rest cannot be had."""
    device = machinery.device
    early, wide = settings.updates == "backward", settings.accumulate > 1
    kept = pool = departures = None
    if device.separate or not early or wide:  # else they are gone with their updates, from where autograd put them
        kept = GradientRoom(trained, device, wide=wide, elsewhere=room.spilled)
        made.callback(kept.close)
    if early and room.spilled and (device.separate or not wide):
        blocks, slots = blocks_of(shards, len(trained)), waiting_blocks(separate=device.separate)
        pool = GradientPool(trained, device, passing=room.spilled, blocks=blocks, wide=wide, slots=slots)
        made.callback(pool.close)
    if device.separate:
        departures = _departures(machinery, trained, settings, room)  # last, for it has a thread
    return GradientIntake(
        trained, Scratch.of(), most=settings.accumulate, room=kept, spill=spill, pool=pool, departures=departures
    )


def _departures(machinery: Machinery, trained: Sequence[Trained], settings: Settings, room: TrainingRoom) -> Departures:
    """How gradients leave a device apart: through a ring where they are added up, or go to disk as they come."""
    wide, later = settings.accumulate > 1, settings.updates == "step"
    passing = [each.parameter.nbytes for i, each in enumerate(trained) if wide or (later and i in room.spilled)]

    def moved() -> int:
        statistics = machinery.engine.statistics()
        return statistics.read_nbytes + statistics.written_nbytes

    return Departures(
        machinery.device,
        ring_nbytes=min(2 * max(passing, default=0), sum(passing)),
        names=[each.name for each in trained],
        moved=moved,
    )


def _device_updates(
    machinery: Machinery, kernel: Optimizer[Any], shards: Sequence[Shard], room: TrainingRoom, *, arrays: int
) -> DeviceUpdates | None:
    """What updates shards on a device apart; None where it updates none."""
    if not room.on_device:
        return None
    elements = max(shard.elements for shard in shards if shard.id in room.on_device)
    made = DeviceUpdates(machinery.device, kernel, elements=elements, arrays=arrays)
    machinery.count(made.arena)
    return made


def _count(machinery: Machinery, pipeline: ShardPipeline, intake: GradientIntake) -> None:
    """Have the arenas counted that the ledger has booked. What all else passes through is small."""
    if not machinery.trains:
        return
    arenas: list[AnyArena] = [*pipeline.arenas]
    arenas += [each.arena for each in (intake.room, intake.pool) if each is not None]
    for arena in arenas:
        machinery.count(arena)
