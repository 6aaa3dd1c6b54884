"""The names that a page needs: modules and blocks, renumbered without gaps, each path told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.profiler.profile import Column, Profile
from ..runtime.profiler.schema import Module
from .clock import ranks


@dataclass(frozen=True, kw_only=True)
class Names:
    """From a profile's numbers to the page's."""

    modules: npt.NDArray[np.int64]
    """Numbers of the profile's modules, ascending; a module's place here is its number on the page."""
    blocks: npt.NDArray[np.int64]
    block_modules: npt.NDArray[np.int64]
    """Page number of the module that each block belongs to; -1 for none."""
    document: dict[str, Any]
    """What the page carries."""

    @classmethod
    def of(cls, profile: Profile) -> Names:
        """Everything that the profile's tables name."""
        modules = np.array(sorted(profile.modules), dtype=np.int64)
        blocks = np.array(sorted(profile.blocks), dtype=np.int64)
        owners = ranks(modules, np.array([profile.blocks[int(b)].module for b in blocks], dtype=np.int64))
        place = {int(number): i for i, number in enumerate(modules)}
        shown = [_module_row(profile, profile.modules[int(number)], place) for number in modules]
        rows = [
            [block.name, block.nbytes, int(block.home), int(owner)]
            for block, owner in zip((profile.blocks[int(b)] for b in blocks), owners, strict=True)
        ]
        return cls(modules=modules, blocks=blocks, block_modules=owners, document={"modules": shown, "blocks": rows})

    def module(self, numbers: Column) -> Column:
        """Page numbers of modules; -1 for none."""
        return ranks(self.modules, numbers)

    def block(self, numbers: Column) -> Column:
        """Page numbers of blocks; -1 for none."""
        return ranks(self.blocks, numbers)

    def owner(self, blocks: Column) -> Column:
        """Page numbers of the modules of blocks, given by page number."""
        if not self.block_modules.size:
            return np.full(len(blocks), -1, dtype=np.int64)
        return np.where(blocks >= 0, self.block_modules[blocks], -1)


def _module_row(profile: Profile, module: Module, place: dict[int, int]) -> list[Any]:
    above = profile.modules.get(module.parent)
    parent = place.get(module.parent, -1)
    prefix = f"{above.path}." if above is not None and above.path else None
    if prefix is not None and module.path.startswith(prefix):
        return [module.path[len(prefix) :], module.kind, parent, 1]  # 1: the path continues its parent's
    return [module.path, module.kind, parent, 0]
