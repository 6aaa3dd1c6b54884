"""From drafts of blocks to homes on three tiers, by what a token costs on the machine: see scheduler/placement/."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..scheduler.cost import CostModel
from ..scheduler.operations import Operation
from ..scheduler.placement.place import place
from ..scheduler.placement.problem import MODES, BlockClass, Mode, Problem, Rates, Rings, Use
from ..scheduler.processors import Candidate, Traffic, saves
from ..scheduler.residency import MAX_SLOTS, Residency

if TYPE_CHECKING:
    from .layout import Draft

REQUEST: Final = 4 * 2**20
SLOT_SIZES: Final = 5
"""Sizes of slots that are tried: the largest blocks, and so many smaller ones."""
CROSSINGS: Final = 2
"""Hand-overs when the CPU computes a part of the model: its inputs come, its results go."""
_LAYER: Final = re.compile(r".*?\.\d+(?=\.|$)|\d+(?=\.|$)")
"""Of the path of a module, what ends with its first number: that of a layer, or of a stage of several."""
_STACKED: Final = re.compile(r"(?:.*\.)?(?:(?:layers|blocks)\.\d+|\d+\.\d+)(?=\.|$)")
"""What ends with the last number that is of a stack: by its name, or as a list in a list. Other numbers inside a layer
are of its parts: `mlp.0`, `experts.5`, the `layer.1` of a T5 block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWork:
    """What a call of the model does, as far as placing is concerned."""

    costs: CostModel
    rows: int
    """Tokens that are multiplied with the same weights: sequences, while they are continued."""
    dtype: str
    """That is computed with, as torch names it."""
    exact: bool = False
    """Whether only one processor may compute."""
    lanes: int = 1
    """Calls that share each copy of a block, each of so many rows. Where they are several they alternate between the
    processors, which then work at the same time."""


def place_on_tiers(
    blocks: Sequence[Draft],
    *,
    work: TokenWork,
    device_nbytes: int,
    host_nbytes: int,
    worth: Mapping[int, float],
    min_slots: int,
    depth_nbytes: int,
    disk_rate: float,
    passing_nbytes: int = 0,
) -> tuple[Residency, Residency, float] | None:
    """What stays on the device, what on the host, and the seconds of a token; None where nothing fits.

    Args:
        blocks: In the order of use; what is always on the device is not among them.
        work: What a token costs.
        device_nbytes: Room on the device.
        host_nbytes: Room on the host.
        worth: Uses of each block per token.
        min_slots: That the device's ring must have.
        depth_nbytes: Bytes that rings should hold to keep links busy.
        disk_rate: Bytes per second of reading the files that the blocks are in.
        passing_nbytes: Of what else comes to the device through the host's ring.
    """
    layers = layers_of(blocks)
    classes = _classes(blocks, work, worth, layers)
    hardware = work.costs.hardware
    problem = Problem(
        classes=tuple(classes),
        device_nbytes=device_nbytes,
        host_nbytes=host_nbytes,
        rates=Rates(
            disk=disk_rate,
            link=hardware.link.h2d.best if hardware.link is not None else 1e12,
            dram=work.costs.memory_rate("cpu"),
        ),
        overlapped=work.lanes > 1,
        layers=layers,
        hand_over_s=work.lanes * _hand_over_s(work),
        copying=hardware.sharing.compute_while_copying,
    )
    found = place(problem, _rings(classes, min_slots, depth_nbytes, device_nbytes, host_nbytes, passing_nbytes))
    if found is None:
        return None
    sizes = {block.id: block for block in blocks}

    def residency(modes: tuple[Mode, ...], slots: int, slot_nbytes: int, nbytes: Mapping[int, int]) -> Residency:
        kept = frozenset(block for block, mode in found.modes.items() if mode in modes)
        streamed = sum(worth.get(b, 1.0) * sizes[b].image.read_nbytes for b, m in found.modes.items() if m not in modes)
        return Residency(
            resident=kept,
            slot_nbytes=slot_nbytes,
            slots=slots,
            resident_nbytes=sum(nbytes[block] for block in kept),
            streamed_nbytes=streamed,
        )

    rings = found.rings
    front = residency(("device",), rings.front_slots, rings.front_slot_nbytes, {b.id: b.front_nbytes for b in blocks})
    back = residency(("host", "cpu"), rings.back_slots, rings.back_slot_nbytes, {b.id: b.image.nbytes for b in blocks})
    return front, back, found.seconds


def _classes(
    blocks: Sequence[Draft], work: TokenWork, worth: Mapping[int, float], layers: Mapping[int, int]
) -> list[BlockClass]:
    """Blocks that take the same of everything, and go to the CPU with as many others: pieces of an output matrix may be
    as large as matrices of layers, and go alone."""
    together = Counter(layers.values())
    alike: dict[tuple[int, int, int, int, float, int], list[int]] = defaultdict(list)
    for block in blocks:
        times = worth.get(block.id, 1.0)
        size = block.front_nbytes, block.image.nbytes, block.image.read_nbytes, block.image.data_nbytes
        alike[*size, times, together[layers[block.id]] if block.id in layers else 0].append(block.id)
    return [
        BlockClass(
            blocks=tuple(ids),
            front_nbytes=front,
            host_nbytes=host,
            read_nbytes=read,
            copied_nbytes=data,
            uses=(use := _use(work, data, times, max(others, 1)),),
            modes=_modes(work, use),
        )
        for (front, host, read, data, times, others), ids in alike.items()
    ]


def _modes(work: TokenWork, use: Use) -> frozenset[Mode]:
    """Those that a block may have. Of blocks that stay on the host all that pay are computed there, where lanes do not
    share them out between the processors later: a plan that copies some of them would not be carried out."""
    return frozenset(MODES) - {"host"} if use.on_cpu and work.lanes == 1 else frozenset(MODES)


def layers_of(blocks: Iterable[Draft]) -> dict[int, int]:
    """By block of a layer, a number for the layer: its blocks go to the CPU together. Of a stage that is a block as a
    whole, one for the stage."""
    found: dict[str, int] = {}
    return {
        block.id: found.setdefault(layer.group(), len(found))
        for block in blocks
        if (layer := _STACKED.match(block.name) or _LAYER.match(block.name)) is not None
    }


def _hand_over_s(work: TokenWork) -> float:
    """Seconds of going to the CPU and back, apart from computing there."""
    if work.exact:
        return 0.0
    link = work.costs.hardware.link
    return CROSSINGS * (work.costs.lending_s + (link.latency_s if link is not None else 0.0))


def _use(work: TokenWork, nbytes: int, times: float, together: int = 1) -> Use:
    """What a block of weights takes per token on either processor, for all lanes; where the CPU pays for a call of one,
    mode cpu computes there. So many blocks go to it `together`."""
    costs = work.costs
    product = Operation(kind="linear", nbytes=nbytes, rows=work.rows, dtype=work.dtype)
    device_s, cpu_s = costs.compute_s((product,), "gpu"), costs.compute_s((product,), "cpu")
    candidate = Candidate(  # what decides in the end, where it stays on the host: see runtime/deciding.py
        block=0,
        operations=(Operation(kind="linear", nbytes=nbytes, dtype=work.dtype),),
        nbytes=nbytes,
        request_nbytes=min(REQUEST, nbytes),
        crossings=CROSSINGS / together,
    )
    pays = saves(candidate, costs, work.rows, Traffic(copying=True))
    calls = times * work.lanes
    return Use(device_s=calls * device_s, cpu_s=calls * cpu_s, on_cpu=pays and not work.exact, times=times)


def cpu_pays(blocks: Sequence[Draft], work: TokenWork) -> bool:
    """Whether the CPU would compute some of these blocks, if they stayed on the host."""
    layers = layers_of(blocks)
    return any(use.on_cpu for each in _classes(blocks, work, {}, layers) for use in each.uses)


def _rings(
    classes: Sequence[BlockClass],
    min_slots: int,
    depth_nbytes: int,
    device_nbytes: int,
    host_nbytes: int,
    passing_nbytes: int,
) -> Iterator[Rings]:
    fronts = _sizes({each.front_nbytes for each in classes})
    largest_host = max(passing_nbytes, *(each.host_nbytes for each in classes))
    seen: set[tuple[int, int, int]] = set()
    for slot in fronts:
        for part in (1, 2, 4):
            front = _slots(min(depth_nbytes // part, max(0, device_nbytes) // 8), slot, min_slots)
            back = _slots(min(depth_nbytes // part, max(0, host_nbytes) // 4), largest_host, 2)
            if (slot, front, back) not in seen:
                seen.add((slot, front, back))
                yield Rings(front_slots=front, front_slot_nbytes=slot, back_slots=back, back_slot_nbytes=largest_host)


def _sizes(sizes: set[int]) -> list[int]:
    """The largest, and some smaller ones: what is larger than the slots has to stay."""
    ordered = sorted(sizes, reverse=True)
    if len(ordered) <= SLOT_SIZES:
        return ordered
    step = (len(ordered) - 1) / (SLOT_SIZES - 1)
    return [ordered[round(index * step)] for index in range(SLOT_SIZES)]


def _slots(depth_nbytes: int, slot: int, least: int) -> int:
    return max(least, min(MAX_SLOTS, -(-depth_nbytes // slot) + 1)) if slot else least
