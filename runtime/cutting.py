"""From a module to blocks, before anything has a home: where it is cut, who leases what, how deep that nests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..memory.image import STAGING, device_image
from .backing import Backing, Portion
from .experts.placed import ExpertCutter, PlacedExperts
from .layout import Draft
from .partition import cut, embedding_only
from .phases import ONCE, once_per_answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A module in blocks, before anything has a home."""

    limit_nbytes: int
    """What parameters were cut by."""
    blocks: list[Draft]
    """In definition order; the first holds the small tensors."""
    leases: dict[str, tuple[int, ...]]
    """By module, as in `Layout`; likewise the next two."""
    expected: dict[str, tuple[int, ...]]
    pieces: dict[str, tuple[int, ...]]
    min_slots: int
    """That nested forwards and one prefetch need."""
    staging_nbytes: int
    """Of the buffers that reads bounce through."""
    once: frozenset[str]
    """Modules that run once per answer."""
    experts: PlacedExperts | None = None
    """The last blocks, where experts are blocks of their own."""

    @property
    def others(self) -> list[Draft]:
        """All blocks but those of experts."""
        return self.blocks if self.experts is None else self.blocks[: self.experts.first]

    @property
    def counts(self) -> Counter[int]:
        """How many modules use each block."""
        return Counter(block for held in self.expected.values() for block in held)

    @property
    def seldom(self) -> frozenset[int]:
        """Blocks that are used once per answer."""
        always = {block for path, held in self.expected.items() if path not in self.once for block in held}
        return frozenset(self.counts.keys() - always)

    @property
    def worth(self) -> dict[int, float]:
        """Uses of each block per token."""
        seldom = self.seldom
        return {block: count * (ONCE if block in seldom else 1.0) for block, count in self.counts.items()}


class Cutter:
    """Cuts one module by any limit.

    Args:
        module: The module.
        backing: Where its parameters are.
        parameters: Those that are in blocks, by name.
        sizes: Their bytes.
        separate: Whether a device apart computes, which blocks lie on in another way.
        keep_skew: Whether they keep their alignment there.
        experts: Cuts experts, where they may be blocks of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        backing: Backing,
        parameters: Mapping[str, nn.Parameter],
        sizes: Mapping[str, int],
        *,
        separate: bool,
        keep_skew: bool,
        experts: ExpertCutter | None = None,
    ) -> None:
        self._experts = experts
        self._module = module
        self._backing = backing
        self._parameters = parameters
        self._sizes = sizes
        self._separate = separate
        self._keep_skew = keep_skew
        self._once = once_per_answer(module)

    def cut(self, limit: int, tables: set[str], *, experts: bool = False) -> Cut:
        """Cut by a limit.

        Args:
            limit: Bytes that blocks are no larger than, but for parameters that are.
            tables: Parameters that are served by rows.
            experts: Whether experts are blocks of their own, one or two each, whatever the limit.
        """
        names = self._experts.names if experts and self._experts is not None else frozenset()
        sizes = {name: nbytes for name, nbytes in self._sizes.items() if name not in names}
        partition = cut(self._module, sizes, limit=limit, tables=tables, apart=self._once)
        blocks: list[Draft] = [self._draft(0, "small tensors", [Portion(name=n) for n in partition.small.names])]
        home: dict[str, int] = {}
        for group in partition.groups:
            block = self._draft(len(blocks), group.anchor or "model", [Portion(name=n) for n in group.names])
            home.update(dict.fromkeys(group.names, block.id))
            blocks.append(block)
        lookups = embedding_only(self._module)
        pieces: dict[str, tuple[int, ...]] = {}
        for name in sorted(tables):
            ids = []
            for rows in [] if name in lookups else self._pieces(name, limit):
                ids.append(len(blocks))
                blocks.append(self._draft(len(blocks), f"{name}[{rows[0]}:{rows[1]}]", [Portion(name=name, rows=rows)]))
            pieces[name] = tuple(ids)
        leases, expected = self._uses(partition.uses, home, pieces)
        placed = None
        if experts and self._experts is not None:
            more, placed = self._experts.blocks(len(blocks))
            blocks += more
        return Cut(
            limit_nbytes=limit,
            blocks=blocks,
            leases=leases,
            expected=expected,
            pieces=pieces,
            min_slots=self._nesting(leases) + 1,
            staging_nbytes=self._staging(blocks, pieces),
            once=self._once,
            experts=placed,
        )

    def _draft(self, number: int, name: str, portions: list[Portion]) -> Draft:
        image = self._backing.image(portions, move=not self._separate)
        return Draft(
            id=number,
            name=name,
            portions=tuple(portions),
            image=image,
            device_image=device_image(image, keep_skew=self._keep_skew) if self._separate else None,
        )

    def _pieces(self, name: str, limit: int) -> list[tuple[int, int]]:
        rows = self._parameters[name].shape[0]
        row = self._sizes[name] // rows
        step = max(1, limit // row)
        if step >= 64:
            step -= step % 64
        even = -(-rows // -(-rows // step))  # pieces of like size; kernels prefer whole tiles
        step = even if step < 64 else -(-even // 64) * 64
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _uses(
        self, uses: Mapping[str, list[str]], home: Mapping[str, int], pieces: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        linear = {path for path, child in self._module.named_modules() if isinstance(child, nn.Linear)}
        first = {id(parameter): name for name, parameter in self._parameters.items()}
        leases, expected = {}, {}
        for path, child in self._module.named_modules():
            names = uses.get(path, [])
            leases[path] = tuple(dict.fromkeys(home[name] for name in names if name in home))
            inner = [first[id(child.weight)]] if path in linear and id(child.weight) in first else []
            expected[path] = leases[path] + tuple(block for name in inner for block in pieces.get(name, ()))
        return leases, expected

    def _nesting(self, leases: Mapping[str, tuple[int, ...]]) -> int:
        """Most blocks that one call chain leases at once."""
        deepest = 1
        for path in leases:
            parts = path.split(".") if path else []
            chain = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
            held = {block for step in chain for block in leases.get(step, ())}
            deepest = max(deepest, len(held))
        return deepest

    def _staging(self, blocks: list[Draft], pieces: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of the buffers that reads bounce through."""
        bounce = max((b.nbytes for block in blocks for b in block.image.bounces), default=0)
        rows = [2 * self._sizes[name] // self._parameters[name].shape[0] for name in pieces]
        return min(STAGING, max([bounce, *rows]))
