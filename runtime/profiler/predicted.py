"""A run that was simulated, as a profile: it opens in the same reports as a measured one, beside it."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from ..foresight import Forecast
from .facts import header
from .moves import Moves
from .recorder import Recorder
from .ring import Ring
from .schema import NONE, Category, Compute, Header, Phase, Step, Tier
from .writer import ProfileWriter

LEVEL: Final = "predicted"


def write_prediction(path: str | os.PathLike[str], forecast: Forecast, *, force: bool = False) -> None:
    """Write what is expected of a run as a profile.

    Raises:
        UsageError: there is something at `path`, and `force` is false.
        DiskError: the file cannot be written.
    """
    prediction = forecast.prediction
    most = 8 * (len(prediction.records) + len(prediction.spans)) + 1000
    ring = Ring(capacity_nbytes=1024 * most)
    recorder = Recorder(ring, clock=lambda: 0)
    made = ProfileWriter(path, _header(forecast), ring, recorder.tables, force=force, interval_s=3600)
    try:
        _record(recorder, forecast)
    finally:
        made.close()


def _header(forecast: Forecast) -> Header:
    plan, hardware = forecast.plan, forecast.hardware
    tiers = {"HOST": plan.host_budget_nbytes}
    capacities = {"HOST": hardware.host_nbytes}
    if hardware.gpu is not None and plan.device_budget_nbytes is not None:
        tiers["DEVICE"] = plan.device_budget_nbytes
        capacities["DEVICE"] = hardware.gpu.memory_nbytes
    peaks = {"DISK_READ": hardware.disk_read, "H2D": hardware.link.h2d.best if hardware.link else 0.0}
    return msgspec.structs.replace(
        header(LEVEL, peaks={name: rate for name, rate in peaks.items() if rate}),
        began_ns=0,
        machine={"host": hardware.name, "cpu": hardware.cpu.name, "gpu": hardware.gpu.name if hardware.gpu else ""},
        capacities=capacities,
        budgets=tiers,
        emulated=hardware.emulated,
    )


def _record(recorder: Recorder, forecast: Forecast) -> None:
    rows = _modules(recorder, forecast)
    separate = forecast.plan.device_budget_nbytes is not None
    tiers = {"device": Tier.DEVICE, "host": Tier.HOST, "disk": Tier.DISK}
    owner = {block: rows.get(path, NONE) for path, blocks in forecast.setting.uses.items() for block in blocks}
    numbers = {}
    for block in forecast.plan.blocks:
        module = owner.get(block.id, NONE)
        numbers[block.id] = recorder.block(name=block.name, nbytes=block.nbytes, home=tiers[block.home], module=module)
        if block.home != "disk":
            recorder.memory(block.nbytes, tiers[block.home], Category.WEIGHT, module=module)
    front = Tier.DEVICE if separate else Tier.HOST
    recorder.memory(forecast.plan.slots * forecast.plan.slot_nbytes, front, Category.ARENA)
    for number, turn in enumerate(forecast.prediction.turns):
        recorder.add(
            Step(id=number, phase=recorder.string(turn.title), start=turn.start_ns, end=turn.end_ns, tokens=turn.tokens)
        )
    for span in forecast.prediction.spans:
        recorder.add(
            Compute(module=rows[span.path], phase=Phase.FORWARD, start=span.start_ns, end=span.end_ns, depth=span.depth)
        )
    moves = Moves(recorder, numbers)
    for record in forecast.prediction.records:
        if (made := moves.of(record)) is not None:
            recorder.add(made)


def _modules(recorder: Recorder, forecast: Forecast) -> dict[str, int]:
    rows: dict[str, int] = {}
    for path in sorted({span.path for span in forecast.prediction.spans} | {""}):
        above = path.rpartition(".")[0]
        while above and above not in rows:
            above = above.rpartition(".")[0]
        rows[path] = recorder.module(path=path, kind="", parent=rows[above] if path else NONE)
    return rows
