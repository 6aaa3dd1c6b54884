"""How much of each tier a model may take: what `max_memory=` and `--max-memory` say."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .memory.errors import UsageError
from .sizes import parse_size

TIERS: Final = ("device", "host", "disk")

_OTHER_NAMES: Final = {
    "cpu": "host",
    "ram": "host",
    "memory": "host",
    "gpu": "device",
    "cuda": "device",
    "vram": "device",
    "ssd": "disk",
    "nvme": "disk",
}
"""What other libraries call the tiers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """Upper bounds in bytes, one per tier. None means auto: worked out from what the machine can give."""

    device: int | None = None
    """GPU memory. Without a GPU, device and host are one tier and `host` is the bound that counts."""
    host: int | None = None
    """RAM."""
    disk: int | None = None
    """Files that penstock writes. Checkpoints that are only read do not count."""

    def __post_init__(self) -> None:
        for tier in TIERS:
            nbytes = getattr(self, tier)
            if nbytes is not None and nbytes < 0:
                raise UsageError(f"the {tier} budget cannot be negative: {nbytes}")


def parse_budget(value: str | Mapping[str, int | str] | MemoryBudget) -> MemoryBudget:
    """The budget that a user wrote.

    `value` is "auto"; or "device=8GiB,host=48GiB"; or a mapping of tiers to bytes or sizes. A tier not named, or
    "auto", is None in the result.

    Raises:
        UsageError: unknown tier (the message names the right one), a tier given twice, or a size without meaning.
    """
    if isinstance(value, MemoryBudget):
        return value
    if isinstance(value, str):
        return _budget([]) if value.strip() == "auto" else _budget(_split(value))
    if isinstance(value, Mapping):
        return _budget(value.items())
    raise UsageError(
        f"max_memory is 'auto', a string such as 'device=8GiB,host=48GiB' or a dict of these tiers, not {value!r}"
    )


def _split(text: str) -> Iterable[tuple[str, str]]:
    for part in text.split(","):
        tier, equals, size = part.partition("=")
        if not equals:
            raise UsageError(
                f"{part.strip()!r} in {text!r} names no tier: write for example host={part.strip() or '8GiB'} "
                f"(tiers: {', '.join(TIERS)}), or auto"
            )
        yield tier.strip(), size.strip()


def _budget(items: Iterable[tuple[object, int | str]]) -> MemoryBudget:
    bounds: dict[str, int | None] = {}
    for key, size in items:
        tier = _tier(key)
        if tier in bounds:
            raise UsageError(f"the {tier} budget is given twice")
        if size == "auto":
            bounds[tier] = None
            continue
        try:
            bounds[tier] = parse_size(size)
        except UsageError as error:
            raise UsageError(f"{tier} budget: {error}") from error
    return MemoryBudget(**bounds)


def _tier(key: object) -> str:
    """The tier called `key`, which may be anything that a dict can hold."""
    if isinstance(key, str) and key in TIERS:
        return key
    # accelerate and transformers number the GPUs: {0: …, "cuda:0": …, "cpu": …}
    name = str(key).lower().split(":")[0]
    right = "device" if name.isdecimal() else _OTHER_NAMES.get(name)
    if right is None:
        right = next(iter(difflib.get_close_matches(name, TIERS, n=1, cutoff=0.5)), None)
    hint = f": write {right!r}" if right else ""
    raise UsageError(f"there is no tier {key!r}{hint}. Tiers are {', '.join(TIERS)}.")
