"""From a layout to what the simulator needs of it."""

from __future__ import annotations

from collections.abc import Mapping

from ..scheduler.residency import Residency
from ..scheduler.setting import Ring, Setting
from ..scheduler.simulated import Moved
from .layout import Layout
from .units import Units


def setting_of(layout: Layout, units: Units | None = None) -> Setting:
    """A layout, as far as time is concerned; `units` are what the CPU computes as a whole, where that is known."""
    separate = layout.back is not None
    leases = {path: blocks for path, blocks in layout.leases.items() if blocks}
    pieces = {
        path: blocks[len(layout.leases.get(path, ())) :]
        for path, blocks in layout.expected.items()
        if len(blocks) > len(layout.leases.get(path, ()))
    }
    return Setting(
        moved={
            block.id: Moved(
                read_nbytes=block.image.read_nbytes, copied_nbytes=block.image.data_nbytes if separate else 0
            )
            for block in layout.blocks
        },
        front=_ring(layout.front, {block.id: block.front_nbytes for block in layout.blocks}),
        back=_ring(layout.back, {block.id: block.image.nbytes for block in layout.blocks}) if layout.back else None,
        uses=leases,
        pieces=pieces,
        on_cpu=layout.on_cpu,
        units={} if units is None else {unit.path: unit.blocks for unit in units.units},
        spare_slots=layout.spare_slots,
    )


def _ring(residency: Residency, nbytes: Mapping[int, int]) -> Ring:
    return Ring(
        permanent={block: nbytes[block] for block in sorted(residency.resident)},
        slots=residency.slots,
        slot_nbytes=residency.slot_nbytes,
    )
