"""From a layout and a model's operations to what a step of training consists of (`scheduler/stepload.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.scratch import SUBCHUNK, Scratch
from ...memory.arena import round_up
from ...scheduler.cost import CostModel
from ...scheduler.operations import Operation
from ...scheduler.program import Enter, Leave, Program
from ...scheduler.stepload import BlockUse, Home, LoadedBlock, StepLoad, Updates, UpdateWork
from ..layout import Draft, Layout
from .departures import HELD_NBYTES
from .early import BEHIND
from .optimizers import OptimizerChoice
from .pipeline import BUFFERS
from .roomplan import TrainingRoom
from .shards import ELEMENTS, SMALL, Shard
from .trained import Trained


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """How steps are taken."""

    choice: OptimizerChoice
    accumulate: int
    updates: Updates
    segments: Sequence[str]
    """Parts of the model whose activations are made again; none where they are kept."""
    spared_s: float = 0.0
    """Of a pass: seconds in which they would make again what has room."""

    @property
    def arrays(self) -> int:
        """Of a shard: masters and states."""
        kernel = self.choice.kernel
        return 1 + len(kernel.states_of(kernel.hyper_of(self.choice.defaults())))


def load_of(
    layout: Layout,
    program: Program,
    cost: CostModel,
    *,
    trained: Sequence[Trained],
    shards: Sequence[Shard],
    room: TrainingRoom,
    settings: StepSettings,
) -> StepLoad:
    """What a step consists of.

    Args:
        layout: Where weights lie.
        program: The forward.
        cost: Of the machine.
        trained: What is trained.
        shards: Of these.
        room: What of gradients and states stays in host memory.
        settings: How steps are taken.
    """
    uses, segments = _uses(layout, program, cost, settings)
    return StepLoad(
        blocks={block.id: block for block in _blocks(layout, trained, shards, room, settings)},
        uses=uses,
        segments=segments,
        slots=layout.front.slots,
        host_slots=layout.back.slots if layout.back else 0,
        separate=layout.back is not None,
        accumulate=settings.accumulate,
        updates=settings.updates,
        arrays=settings.arrays,
        update=update_work(settings.choice),
        shard_elements=ELEMENTS,
        buffers=BUFFERS,
        behind=BEHIND,
        leaving_nbytes=HELD_NBYTES,
        small=SMALL,
    )


def _blocks(
    layout: Layout, trained: Sequence[Trained], shards: Sequence[Shard], room: TrainingRoom, settings: StepSettings
) -> Iterator[LoadedBlock]:
    """The blocks of a layout, with what belongs to what is trained in them, or (adapters) beside them."""
    owner = {piece.parameter: shard.block for shard in shards for piece in shard.pieces}
    frozen = {portion.name for block in layout.blocks for portion in block.portions}.isdisjoint(t.name for t in trained)
    # gradients of one pass that go into early updates go to disk only where they have to wait for others for long
    spilled = room.spilled if settings.updates == "step" or settings.accumulate > 1 else frozenset()
    for block in layout.blocks:
        members = [index for index in range(len(trained)) if owner[index] == block.id]
        own = [shard for shard in shards if shard.block == block.id]
        kept = {index: trained[index].elements * room.itemsizes[index] for index in members}
        states = {shard.id: settings.arrays * shard.array_nbytes for shard in own}
        gradient = sum(trained[index].elements * trained[index].parameter.itemsize for index in members)
        home, changed = _home(layout, block), round_up(block.image.nbytes)
        homed = home == "device" and layout.back is not None and block.id in layout.back.resident
        changes = bool(members) and not frozen
        yield LoadedBlock(
            id=block.id,
            home=home,
            # what has changed is read from a scratch file, where its slot lies as it is
            read_nbytes=changed if changes else block.image.read_nbytes,
            weights_nbytes=block.image.data_nbytes + (gradient if frozen else 0),  # adapters lie beside blocks
            written_nbytes=changed if changes and not (home == "host" or homed) else 0,
            homed=homed,
            elements=sum(trained[index].elements for index in members),
            elements_there=sum(piece.elements for shard in own if shard.id in room.on_device for piece in shard.pieces),
            tensors=max(len(members), 1),
            states_nbytes=sum(states.values()),
            states_moved_nbytes=sum(nbytes for shard, nbytes in states.items() if shard not in room.resident),
            gradient_nbytes=gradient,
            kept_nbytes=sum(kept.values()),
            spilled_nbytes=sum(nbytes for index, nbytes in kept.items() if index in spilled),
            spilled_read_nbytes=sum(
                round_up(piece.elements * room.itemsizes[piece.parameter])
                for shard in own
                for piece in shard.pieces
                if piece.parameter in spilled
            ),
        )


def _home(layout: Layout, block: Draft) -> Home:
    if block.id in layout.front.resident:
        return "device" if layout.back else "host"
    return "host" if layout.back and block.id in layout.back.resident else "disk"


# --- the order of uses ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Stretch:
    """Operations for which the same blocks are lent."""

    blocks: tuple[int, ...]
    segment: str | None
    forward: list[Operation] = field(default_factory=list)
    again: int = 0
    """How many of these a segment computes again."""
    backward: list[Operation] = field(default_factory=list)
    saved: bool = False


def _uses(
    layout: Layout, program: Program, cost: CostModel, settings: StepSettings
) -> tuple[tuple[BlockUse, ...], tuple[tuple[int, int], ...]]:
    """The stretches of a forward, and those that run again."""
    stretches = _stretches(layout, program, frozenset(settings.segments))
    again: list[tuple[int, int]] = []
    start = 0
    for index, stretch in enumerate(stretches):
        following = stretches[index + 1].segment if index + 1 < len(stretches) else None
        if stretch.segment != following:
            if stretch.segment is not None:
                again.append((start, index + 1))
                _cut_short(stretches[start : index + 1])
            start = index + 1
    again_s = [cost.compute_s(stretch.forward[: stretch.again], "gpu") for stretch in stretches]
    left = max(0.0, 1 - settings.spared_s / sum(again_s)) if any(again_s) else 1.0  # what is held is spread evenly
    uses = tuple(
        BlockUse(
            blocks=stretch.blocks,
            forward_s=cost.compute_s(stretch.forward, "gpu"),
            again_s=left * seconds,
            backward_s=cost.compute_s(stretch.backward, "gpu"),
            saved=stretch.saved,
        )
        for stretch, seconds in zip(stretches, again_s, strict=True)
    )
    return uses, tuple(again)


def _cut_short(segment: Sequence[_Stretch]) -> None:
    """Of a segment, what runs again ends before its last product: that has saved all it will need, and its result is of
    no use."""
    left = False
    for stretch in reversed(segment):
        stretch.again = len(stretch.forward)
        while not left and stretch.again:
            stretch.again -= 1
            left = stretch.forward[stretch.again].kind == "linear"


def _stretches(layout: Layout, program: Program, segments: frozenset[str]) -> list[_Stretch]:
    found: list[_Stretch] = []
    stack: list[tuple[tuple[int, ...], str | None]] = [((), None)]
    for place, event in enumerate(program.events):
        match event:
            case Enter(path=path):
                blocks = tuple(block for block in layout.leases.get(path, ()) if block != SMALL)
                segment = path if path in segments else stack[-1][1]
                stack.append((blocks or stack[-1][0], segment))
            case Leave():
                stack.pop()
            case Operation():
                blocks, segment = stack[-1]
                last = found[-1] if found else None
                if last is None or last.segment != segment or (blocks and blocks != last.blocks):
                    last = _Stretch(blocks=blocks, segment=segment)
                    found.append(last)
                last.forward.append(event)
                last.backward.append(_back(event, learns=place in program.learned))
                last.saved |= event.kind == "linear"
    return found


def _back(operation: Operation, *, learns: bool) -> Operation:
    """The backward of an operation: of a product the two others with its factors, or one where its weights are frozen;
    everything else reads and writes what forward did, and the gradients of it."""
    if operation.kind == "attention":
        return replace(operation, kind="attention back")
    times = 1 if operation.kind == "linear" and not learns else 2
    return replace(operation, nbytes=times * operation.nbytes, launches=times * operation.launches)


# --- the optimizer ----------------------------------------------------------------------------------------------------


class _Passes(TorchDispatchMode):
    """Sums what operations on arrays read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = self.operations = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "split" not in str(func) and result.dim():
            copies = "copy_" in str(func)
            inputs = [each for each in args[1 if copies else 0 :] if isinstance(each, Tensor) and each.dim()]
            self.nbytes += sum(each.nbytes for each in (*inputs, result))
            self.operations += 1
        return result


def update_work(choice: OptimizerChoice) -> UpdateWork:
    """What an optimizer does per element, found by letting it update a few."""
    kernel, count = choice.kernel, 1024
    hyper = kernel.hyper_of(choice.defaults())
    master, *states = (torch.ones(count) for _ in range(1 + len(kernel.states_of(hyper))))
    gradient, out = torch.ones(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16)
    scratch, passes = Scratch.of(count), _Passes()
    with passes:
        kernel.update(master, states, gradient, hyper, step=2, scratch=scratch, out=out)
    return UpdateWork(nbytes=passes.nbytes / count, operations=passes.operations, elements=SUBCHUNK)
