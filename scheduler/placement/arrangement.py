"""Where in a model the blocks of a placement are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .problem import MODES, BlockClass, Counts, Mode, Problem, Rings

DEVICE = MODES.index("device")


def spread(classes: Iterable[BlockClass], counts: Counts) -> dict[int, Mode]:
    """Give every block a mode so that each mode is spread evenly over the blocks of a class, in their order.

    A run of streamed blocks would leave the processor waiting, a run of resident ones the drive idle.
    """
    found: dict[int, Mode] = {}
    for each, row in zip(classes, counts, strict=True):
        found |= _evenly(each.blocks, row)
    return found


def together(classes: Iterable[BlockClass], counts: Counts) -> dict[int, Mode]:
    """The same, but what stays on the device is at the start of the model: processors change once.

    The other modes are spread over the rest.
    """
    found: dict[int, Mode] = {}
    for each, row in zip(classes, counts, strict=True):
        first, rest = each.blocks[: row[DEVICE]], [0 if mode == DEVICE else row[mode] for mode in range(len(MODES))]
        found |= dict.fromkeys(first, MODES[DEVICE])
        found |= _evenly(each.blocks[row[DEVICE] :], rest)
    return found


def _evenly(blocks: Sequence[int], row: Sequence[int]) -> Iterator[tuple[int, Mode]]:
    """At every position the mode that is farthest behind its share comes next."""
    given = [0] * len(MODES)
    total = len(blocks)
    for position, block in enumerate(blocks):
        behind = [row[m] * (position + 0.5) / total - given[m] if given[m] < row[m] else -math.inf
                  for m in range(len(MODES))]  # fmt: skip
        mode = behind.index(max(behind))
        given[mode] += 1
        yield block, MODES[mode]


def by_layers(problem: Problem, rings: Rings, *, on_device: bool) -> dict[int, Mode]:
    """Whole layers on one processor: at the start on the device, as far as it has room, then on the CPU.

    What the host has no room for is read for every use. Only blocks that no ring takes are out of this order.

    Args:
        on_device: Whether any layer is to be on the device.
    """
    allowed = {
        block: dict(zip(MODES, may, strict=True))
        for each, may in zip(problem.classes, problem.allowed(rings), strict=True)
        for block in each.blocks
    }
    kind = {block: each for each in problem.classes for block in each.blocks}
    room = {"device": problem.device_nbytes - rings.front_nbytes, "host": problem.host_nbytes - rings.back_nbytes}
    layers: dict[int, list[int]] = defaultdict(list)
    for block in sorted(kind):
        layers[problem.layers.get(block, -1 - block)].append(block)
    found: dict[int, Mode] = {}

    def give(blocks: Sequence[int], mode: Mode) -> bool:
        tier = "device" if mode == "device" else "host"
        nbytes = sum(kind[b].front_nbytes if tier == "device" else kind[b].host_nbytes for b in blocks)
        if nbytes > room[tier] or not all(allowed[block][mode] for block in blocks):
            return False
        room[tier] -= nbytes
        found.update(dict.fromkeys(blocks, mode))
        return True

    for block, may in allowed.items():
        if not any(may[mode] for mode in MODES if mode != "device"):
            give([block], "device")
    for blocks in layers.values():
        left = [block for block in blocks if block not in found]
        if not (on_device and give(left, "device")) and not give(left, "cpu"):
            found.update(dict.fromkeys(left, "disk"))
    return found


def counts_of(classes: Iterable[BlockClass], modes: Mapping[int, Mode]) -> Counts:
    """How many blocks of each class have each mode."""
    return tuple(tuple(sum(modes[block] == mode for block in each.blocks) for mode in MODES) for each in classes)
