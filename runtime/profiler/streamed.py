"""A model that penstock streams, on the record: transfers, waits, uses, and the bytes of its slots."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from torch import nn

from ...memory.disk import DiskEngine
from ...scheduler.residence import Tier as Slots
from ...scheduler.timeline import Record as Happened
from ..build import Machinery
from .calls import ModuleWatch
from .moves import Moves
from .recorder import Recorder
from .schema import NONE, Category, MarkKind, Tier, Transfer

_MARKS: Final = {
    "mismatch": MarkKind.MISMATCH,
    "demand": MarkKind.DEMAND,
    "relearn": MarkKind.RELEARN,
    "exchange": MarkKind.EXCHANGE,
    "error": MarkKind.ERROR,
}


class StreamedModel:
    """Listens to one machinery's timeline from when it is made until `close`."""

    def __init__(self, recorder: Recorder, watch: ModuleWatch, module: nn.Module, machinery: Machinery) -> None:
        self._recorder = recorder
        self._machinery = machinery
        root = watch.register(module)
        self._owners = _owners(module, machinery, watch, root)
        self._rows = self._blocks(watch, module)
        self._moves = Moves(recorder, self._rows)
        self._charged: dict[tuple[Tier, int], list[tuple[int, int]]] = {}
        """What the blocks that stay are charged with: module and bytes, by tier and block."""
        self._arenas: list[tuple[Tier, int]] = []
        """Bytes that blocks pass through, by tier."""
        self._lock = threading.Lock()
        machinery.timeline.listener = self._hear  # first, so that no block can come between looking and listening
        self._charge_what_is_there()

    @property
    def parameters(self) -> set[int]:
        """Ids of the parameters whose bytes are accounted for here."""
        bound = {id(b.parameter) for binding in self._machinery.bindings.values() for b in binding.tensors}
        return bound | set(self._machinery.tables)

    def close(self) -> None:
        """Listen no more."""
        self._machinery.timeline.listener = None

    def gone(self) -> None:
        """The model has been closed, and has given its memory back."""
        self.close()
        for tier, nbytes in self._arenas:
            self._recorder.memory(-nbytes, tier, Category.ARENA)
        self._arenas.clear()
        with self._lock:
            charged = [(tier, shares) for (tier, _), shares in self._charged.items()]
            self._charged.clear()
        for tier, shares in charged:
            for row, nbytes in shares:
                self._recorder.memory(-nbytes, tier, Category.WEIGHT, module=row)

    def _blocks(self, watch: ModuleWatch, module: nn.Module) -> dict[int, int]:
        layout = self._machinery.layout
        nearest = watch.nearest(module)
        leased: dict[int, set[int]] = {}
        for path, numbers in layout.expected.items():
            for number in numbers:
                leased.setdefault(number, set()).add(nearest.get(path, NONE))
        experts = layout.experts
        for part in () if experts is None else experts.blocks:
            for layer, numbers in zip(experts.layers, part.tolist(), strict=True):  # type: ignore[union-attr]
                leased.update({number: {nearest.get(layer.path, NONE)} for number in numbers})
        rows = {}
        for block in layout.blocks:
            home = Tier.DISK
            if block.id in layout.front.resident:
                home = Tier.DEVICE if layout.back else Tier.HOST
            elif layout.back and block.id in layout.back.resident:
                home = Tier.HOST
            by = leased.get(block.id, set())
            row = next(iter(by)) if len(by) == 1 else NONE
            rows[block.id] = self._recorder.block(
                name=block.name, nbytes=block.image.data_nbytes, home=home, module=row
            )
        return rows

    # --- memory -----------------------------------------------------------------------------------------------------

    def _tiers(self) -> list[tuple[Tier, Slots]]:
        machinery = self._machinery
        if machinery.back is None:
            return [(Tier.HOST, machinery.front)]
        return [(Tier.DEVICE, machinery.front), (Tier.HOST, machinery.back)]

    def _charge_what_is_there(self) -> None:
        machinery = self._machinery
        with machinery.executor.core.lock:
            there = [(tier, b) for tier, s in self._tiers() for b, h in s.holding.items() if h.permanent and h.ready]
        for tier, block in there:
            self._charge(tier, block)
        layout = machinery.layout
        for tier, residency in (
            (Tier.DEVICE, layout.front if layout.back else None),
            (Tier.HOST, layout.back or layout.front),
        ):
            if residency is not None:
                self._arenas.append((tier, residency.slots * residency.slot_nbytes))
        self._arenas.append((Tier.HOST, layout.expert_host_nbytes))
        self._arenas.append((Tier.DEVICE, layout.expert_device_nbytes))
        self._arenas.append((Tier.HOST, DiskEngine.own_nbytes(layout.staging_nbytes)))
        if machinery.device.separate and machinery.device.torch_device.type == "cpu":
            # an emulated device's memory is the host's
            self._arenas.append((Tier.HOST, layout.front.nbytes + layout.expert_device_nbytes))
        for tier, nbytes in self._arenas:
            self._recorder.memory(nbytes, tier, Category.ARENA)

    def _charge(self, tier: Tier, block: int) -> None:
        with self._lock:
            if (tier, block) in self._charged:
                return
            self._charged[tier, block] = self._owners[block]
        for row, nbytes in self._owners[block]:
            self._recorder.memory(nbytes, tier, Category.WEIGHT, module=row)

    def _take_back_what_left(self) -> None:
        for tier, slots in self._tiers():
            for charged, block in list(self._charged):
                if charged is tier and block not in slots.permanent:
                    with self._lock:
                        shares = self._charged.pop((tier, block), [])
                    for row, nbytes in shares:
                        self._recorder.memory(-nbytes, tier, Category.WEIGHT, module=row)

    # --- the timeline -----------------------------------------------------------------------------------------------

    def _hear(self, record: Happened) -> None:
        recorder = self._recorder
        if not recorder.alive:
            return
        recorder.hooks += 1
        made = self._moves.of(record)
        if made is not None:
            recorder.add(made)
            if isinstance(made, Transfer):
                self._charge_what_came(record)
        else:
            recorder.mark(_MARKS[record.kind], block=self._rows.get(record.block, NONE))
            if record.kind == "exchange":
                self._take_back_what_left()

    def _charge_what_came(self, record: Happened) -> None:
        tier, slots = self._tiers()[-1 if record.kind == "read" else 0]
        if record.block in slots.permanent:
            self._charge(tier, record.block)


def _owners(module: nn.Module, machinery: Machinery, watch: ModuleWatch, root: int) -> dict[int, list[tuple[int, int]]]:
    """For each block the modules whose parameters it holds, with their bytes."""
    nearest = watch.nearest(module)
    found = {}
    for block in machinery.layout.blocks:
        shares: Counter[int] = Counter()
        for portion in block.portions:
            row = nearest.get(portion.name.rpartition(".")[0], root)
            shares[row] += block.image.places[portion.key].nbytes
        found[block.id] = list(shares.items())
    return found
