"""`penstock.prepare`: a streamed model and its optimizer, with masters and states in a folder of the run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...memory.errors import DiskError, StoreError, UsageError
from ...memory.scratch import Scratch as ScratchFolder
from ...memory.scratch import process_scratch
from ...memory.store import BlockSpec, BlockStore, check_unused, check_vacant
from ...memory.trim import return_free_memory
from ..build import Machinery
from ..launch import open_scratch, scratch_files
from ..links import LinkCache
from .activations import arrange_activations
from .adapterweights import AdapterWeights
from .assembly import assemble
from .buffers import restore_buffers
from .facade import StreamedOptimizer
from .optimizers import SGD, AdamW, Lion, OptimizerChoice
from .roomplan import TrainingRoom, adapter_room, moves_activations, plan_room, tell
from .run import Origin, RunState, Settings, decode, set_random_state
from .selection import find_trained, only_trained, shards_of
from .shards import Shard
from .trained import Trained
from .training import Training


@dataclass(frozen=True, kw_only=True)
class RunFolders:
    """Where a run lies: one folder, or one on each drive."""

    folders: Sequence[str]

    @property
    def states(self) -> list[str]:
        """Of the block store."""
        return [os.path.join(folder, "states") for folder in self.folders]

    @property
    def scratch(self) -> list[str]:
        """Of weights that stream; worth nothing after the run."""
        return [os.path.join(folder, "scratch") for folder in self.folders]


def attach(
    model: nn.Module,
    choice: OptimizerChoice,
    folders: RunFolders,
    *,
    origin: Origin,
    settings: Settings,
    cache: LinkCache,
) -> StreamedOptimizer:
    """Train a streamed model (loaded or offloaded for it), from the weights it has.

    Args:
        cache: Knows how fast drives are.

    Raises:
        UsageError: nothing wants a gradient.
        StoreError: the folder holds a run already, or something else.
        DoesNotFitError: a drive has not enough room.
    """
    machinery = machinery_of(model)
    trained = find_trained(model, machinery)
    shards = shards_of(trained, machinery)
    arrays = arrays_of(choice)
    with ExitStack() as made:
        specs = [
            BlockSpec(name=f"shard {shard.id}", kind="optimizer", nbytes=arrays * shard.array_nbytes)
            for shard in shards
        ]
        store = BlockStore.create(folders.states, specs, identity=identity_of(trained, shards, choice.mathematics))
        made.callback(store.close)
        scratches = scratches_of(folders, machinery, settings, made)
        room = room_of(machinery, trained, shards, settings, arrays=arrays)
        training = assemble(machinery, trained, shards, store, choice.kernel, scratches, settings, room, arrays=arrays)
        made.callback(training.close)
        training.write_masters(master_of(machinery, trained))
        look_before(model, training)
        optimizer = StreamedOptimizer(training, choice, store, model=model, origin=origin, settings=settings)
        tell(model, machinery, room)
        arrange_activations(model, machinery, settings, room, scratch_files(scratches, "activations.bin"), cache)
        return_free_memory()  # of masters that passed through
        machinery.before_close(training.settle)
        machinery.before_close(training.last)
        machinery.on_close(made.pop_all().close)
    return optimizer


def go_on(
    model: nn.Module, folders: RunFolders, *, origin: Origin, settings: Settings, cache: LinkCache
) -> StreamedOptimizer:
    """The same from the last commit of a run: weights are made of its masters.

    Raises:
        StoreError: there is no run.
        UsageError: the model is another one.
    """
    machinery = machinery_of(model)
    with ExitStack() as made:
        store = BlockStore.open(folders.states)
        made.callback(store.close)
        state = decode(store.metadata)
        only_trained(model, state.names)
        trained = find_trained(model, machinery)
        choice = choice_of(state)
        cuts = (shards_of(trained, machinery, by_expert=by_expert) for by_expert in (True, False))
        known = (cut for cut in cuts if identity_of(trained, cut, state.mathematics) == store.identity)
        shards = next(known, None)
        if shards is None:
            raise UsageError(
                f"{folders.states[0]} belongs to another model: its parameters have other names, shapes or places. "
                "Give the one that the run was begun with"
            )
        scratches = scratches_of(folders, machinery, settings, made)
        arrays = arrays_of(choice)
        room = room_of(machinery, trained, shards, settings, arrays=arrays)
        training = assemble(
            machinery,
            trained,
            shards,
            store,
            choice.kernel,
            scratches,
            settings,
            room,
            arrays=arrays,
            counts=state.steps,
        )
        made.callback(training.close)
        training.weights_from_masters()
        look_before(model, training)
        restore_buffers(model, state.buffers)
        optimizer = StreamedOptimizer(
            training, choice, store, model=model, origin=origin, settings=settings, state=state
        )
        set_random_state(state.random)
        tell(model, machinery, room)
        arrange_activations(model, machinery, settings, room, scratch_files(scratches, "activations.bin"), cache)
        return_free_memory()  # of masters that passed through
        machinery.before_close(training.settle)
        machinery.before_close(training.last)
        machinery.on_close(made.pop_all().close)
    return optimizer


def scratches_of(folders: RunFolders, machinery: Machinery, settings: Settings, made: ExitStack) -> list[ScratchFolder]:
    """Folders for what is moved in a step, to be closed with `made`: weights that change, gradients, activations."""
    wanted = machinery.trains or moves_activations(machinery.layout, settings, frozen=True)
    return open_scratch(folders.scratch, made) if wanted else []


def room_of(
    machinery: Machinery, trained: Sequence[Trained], shards: Sequence[Shard], settings: Settings, *, arrays: int
) -> TrainingRoom:
    """What of gradients and states stays in host memory: of adapters, all."""
    if machinery.trains:
        known = machinery.changing is not None and machinery.changing.saved_nbytes is not None
        return plan_room(machinery.layout, trained, shards, settings, arrays=arrays, saved_is_known=known)
    return adapter_room(machinery.layout, trained, shards, settings, arrays=arrays)


def check_new(folders: RunFolders) -> None:
    """See that no run would be lost, make the folders, and take away what killed processes left of their weights.

    What was cut off before its first commit is no run.

    Raises:
        StoreError: there is one.
        StoreBusyError, ScratchBusyError: another process is at work there.
        DiskError: a folder cannot be made.
    """
    check_vacant(folders.states)
    for folder in folders.folders:
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"cannot make the folder {folder}: {error.strerror}. Name another with disk=… (--out)"
            ) from error
    _clear_scratch(folders)


def _clear_scratch(folders: RunFolders) -> None:
    for folder in folders.scratch:
        process_scratch().remove_leftovers(folder)


def check_trained(module: nn.Module, choice: OptimizerChoice) -> None:
    """See that a module has something to train, and what the groups name.

    Raises:
        UsageError: it has not.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not names:
        raise UsageError("no parameter wants a gradient: set requires_grad on those that are to be trained")
    choice.grouped(names)


def state_of_run(folders: RunFolders) -> RunState:
    """What the last commit of a run says, which is about to go on: what killed processes left of its weights goes.

    Raises:
        StoreError: there is no run, or nothing was committed.
        StoreBusyError, ScratchBusyError: another process is at work on it.
    """
    with BlockStore.open(folders.states, readonly=True) as store:
        if not store.committed:
            raise StoreError(f"{folders.states[0]} holds no commit yet: begin anew with penstock.prepare")
        check_unused(store.folders)
        _clear_scratch(folders)
        return decode(store.metadata)


def machinery_of(model: nn.Module) -> Machinery:
    """What runs a streamed model."""
    machinery = model.penstock.machinery  # type: ignore[union-attr]
    assert isinstance(machinery, Machinery)
    return machinery


def arrays_of(choice: OptimizerChoice) -> int:
    """Arrays of a shard: masters and states."""
    return 1 + len(choice.kernel.states_of(choice.kernel.hyper_of(choice.defaults())))


def choice_of(state: RunState) -> OptimizerChoice:
    """The optimizer of a run, with the hyperparameters of its last group; the others come with `groups`."""
    kinds: dict[str, type[OptimizerChoice]] = {kind.mathematics: kind for kind in (AdamW, SGD, Lion)}
    kind = kinds[state.mathematics]
    known = {f.name for f in fields(kind)}
    last = {name: _exact(value) for name, value in state.groups[-1].items() if name in known}
    return kind(max_grad_norm=state.max_grad_norm, **last)


def _exact(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def master_of(machinery: Machinery, trained: Sequence[Trained]) -> Callable[[int], torch.Tensor]:
    """Gives a parameter's present weights in fp32, flat, as they lie in memory."""
    if not machinery.trains:
        resident = AdapterWeights(trained)
        return lambda index: resident.value(trained[index].name)
    session = machinery.session
    home = {bound.name: binding for binding in machinery.bindings.values() for bound in binding.tensors}

    def value(index: int) -> torch.Tensor:
        each = trained[index]
        lease = session.lend(home[each.name].block, observed=False)
        try:
            weight = each.parameter.detach()
            return weight.as_strided((weight.numel(),), (1,)).to("cpu", torch.float32, copy=True)
        finally:
            session.take_back(lease)

    return value


def identity_of(trained: Sequence[Trained], shards: Sequence[Shard], mathematics: str) -> str:
    """What a run's folder is told apart by: the trained parameters, how they are cut, and the optimizer."""
    pieces = [(p.parameter, p.start, p.stop, p.at) for shard in shards for p in shard.pieces]
    text = mathematics + "".join(f"\n{each.name} {tuple(each.parameter.shape)}" for each in trained) + repr(pieces)
    return hashlib.sha256(text.encode()).hexdigest()


def run_folders(disk: Sequence[str]) -> RunFolders:
    """Where a run is to lie.

    Raises:
        UsageError: no folder was named.
    """
    if not disk:
        raise UsageError(
            'training needs a folder for masters and optimizer states, twice 12 bytes per parameter: disk="run/"'
        )
    return RunFolders(folders=[os.fspath(Path(folder)) for folder in disk])


def look_before(model: nn.Module, training: Training) -> None:
    """Let `state_dict` of the model or of a part wait for the step that is being carried out, and experts for what they
    are behind."""
    if training.catch_up is not None:
        training.catch_up.install(model)

    def finish(*_: object) -> None:
        training.finish()

    for child in model.modules():
        child.register_state_dict_pre_hook(finish)  # type: ignore[no-untyped-call]


def trainable(model: Any) -> None:
    """Let every floating-point parameter want a gradient: those of a loaded checkpoint do not."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
