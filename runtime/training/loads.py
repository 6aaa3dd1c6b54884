"""From a layout and a model's operations to what a step of training consists of (`scheduler/stepload.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.scratch import SUBCHUNK, Scratch
from ...scheduler.cost import CostModel
from ...scheduler.operations import Operation
from ...scheduler.program import Enter, Leave, Program
from ...scheduler.sharing import share_out
from ...scheduler.stepload import BlockUse, Home, LoadedBlock, StepLoad, Updates, UpdateWork
from ...scheduler.updating import ON_CPU, UpdateShares
from ..layout import Draft, Layout
from .early import BEHIND
from .optimizers import OptimizerChoice
from .pipeline import BUFFERS
from .shards import ELEMENTS, SMALL

ATTENTION_BACK = 2.5
"""Attention's backward over its forward: five products instead of two, since the scores are worked out again (Dao,
"FlashAttention-2", 2023, section 3.1.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """How steps are taken."""

    choice: OptimizerChoice
    accumulate: int
    updates: Updates
    shares: UpdateShares = ON_CPU
    """What a device apart updates."""
    segments: Sequence[str]
    """Parts of the model whose activations are made again; none where they are kept."""

    @property
    def arrays(self) -> int:
        """Of a shard: masters and states."""
        kernel = self.choice.kernel
        return 1 + len(kernel.states_of(kernel.hyper_of(self.choice.defaults())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What is trained."""

    elements: Mapping[str, int]
    """Of each parameter that is one of the model's."""
    itemsize: int
    """Bytes of an element of a gradient of one backward pass."""
    beside: int = 0
    """Elements of adapters, which stay in memory with all that belongs to them."""


def load_of(
    layout: Layout,
    program: Program,
    cost: CostModel,
    *,
    learned: Learned,
    settings: StepSettings,
    room_nbytes: int,
    passing_nbytes: int = 0,
) -> StepLoad:
    """What a step consists of.

    Args:
        layout: Where weights lie.
        program: The forward.
        cost: Of the machine.
        learned: What is trained.
        settings: How.
        room_nbytes: Host memory that gradients and states may take beyond what they need at least: gradients first,
            since a byte of them on disk is moved twice per backward pass, and a byte of state twice per step.
        passing_nbytes: What gradients have at least, to pass through where they do not all stay.
    """
    blocks = {block.id: _block(layout, block, learned, settings) for block in layout.blocks}
    if learned.beside:
        small = blocks[SMALL]
        nbytes = learned.beside * learned.itemsize
        blocks[SMALL] = _with(small, learned.beside, nbytes, settings, states_in_memory=True)
    uses, segments = _uses(layout, program, cost, settings.segments)
    return StepLoad(
        blocks=_shared_out(blocks, settings, room_nbytes + passing_nbytes, passing_nbytes),
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
        device_in_memory=settings.shares.in_memory,
        device_on_disk=settings.shares.on_disk,
        small=SMALL,
    )


def _block(layout: Layout, block: Draft, learned: Learned, settings: StepSettings) -> LoadedBlock:
    home: Home = "disk"
    if block.id in layout.front.resident:
        home = "device" if layout.back else "host"
    elif layout.back and block.id in layout.back.resident:
        home = "host"
    plain = LoadedBlock(
        id=block.id,
        home=home,
        read_nbytes=block.image.read_nbytes,
        weights_nbytes=block.image.data_nbytes,
        homed=home == "device" and layout.back is not None and block.id in layout.back.resident,
    )
    elements = sum(learned.elements.get(portion.name, 0) for portion in block.portions)
    nbytes = sum(
        block.image.places[portion.key].nbytes for portion in block.portions if portion.name in learned.elements
    )
    return _with(plain, elements, nbytes, settings) if elements else plain


def _with(
    block: LoadedBlock, elements: int, nbytes: int, settings: StepSettings, *, states_in_memory: bool = False
) -> LoadedBlock:
    """A block with what belongs to so many elements more, of so many bytes."""
    total = block.elements + elements
    gradient = block.gradient_nbytes + nbytes
    return LoadedBlock(
        id=block.id,
        home=block.home,
        read_nbytes=block.read_nbytes,
        weights_nbytes=block.weights_nbytes + (nbytes if states_in_memory else 0),
        elements=total,
        states_nbytes=4 * settings.arrays * total,
        states_in_memory=states_in_memory,
        gradient_nbytes=gradient,
        kept_nbytes=4 * total if settings.accumulate > 1 else gradient,
        homed=block.homed,
    )


def _shared_out(
    blocks: Mapping[int, LoadedBlock], settings: StepSettings, room: int, passing: int
) -> dict[int, LoadedBlock]:
    """The blocks with what of them stays in memory, spread over the order of use; the small tensors' gradients do."""
    changed = [block for block in blocks.values() if block.elements and not block.states_in_memory]
    early = settings.updates == "backward"
    # Those of one pass that go into early updates wait in memory, as it is counted, and nowhere else.
    movable = [block for block in changed if block.id != SMALL and not (early and settings.accumulate == 1)]
    shares = share_out(
        room,
        gradients=[block.kept_nbytes for block in movable],
        gradient_moves=2 * max(settings.accumulate - early, 1),
        states=[block.states_nbytes for block in changed],
        passing_nbytes=passing if movable else 0,
    )
    spilled = {block.id for place, block in enumerate(movable) if place not in shares.gradients}
    states = {changed[place].id for place in shares.states}
    found = dict(blocks)
    for block in changed:
        found[block.id] = LoadedBlock(
            id=block.id,
            home=block.home,
            read_nbytes=block.read_nbytes,
            weights_nbytes=block.weights_nbytes,
            elements=block.elements,
            states_nbytes=block.states_nbytes,
            states_in_memory=block.id in states,
            gradient_nbytes=block.gradient_nbytes,
            kept_nbytes=block.kept_nbytes,
            spilled=block.id in spilled,
            homed=block.homed,
        )
    return found


# --- the order of uses ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Stretch:
    """Operations for which the same blocks are lent."""

    blocks: tuple[int, ...]
    segment: str | None
    forward: list[Operation] = field(default_factory=list)
    backward: list[Operation] = field(default_factory=list)
    saved: bool = False


def _uses(
    layout: Layout, program: Program, cost: CostModel, segments: Iterable[str]
) -> tuple[tuple[BlockUse, ...], tuple[tuple[int, int], ...]]:
    """The stretches of a forward, and those that run again."""
    stretches = _stretches(layout, program, frozenset(segments))
    again: list[tuple[int, int]] = []
    start = 0
    for index, stretch in enumerate(stretches):
        following = stretches[index + 1].segment if index + 1 < len(stretches) else None
        if stretch.segment != following:
            if stretch.segment is not None:
                again.append((start, index + 1))
            start = index + 1
    uses = tuple(
        BlockUse(
            blocks=stretch.blocks,
            forward_s=cost.compute_s(stretch.forward, "gpu"),
            backward_s=cost.compute_s(stretch.backward, "gpu"),
            saved=stretch.saved,
        )
        for stretch in stretches
    )
    return uses, tuple(again)


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
        return replace(operation, nbytes=ATTENTION_BACK * operation.nbytes)
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
