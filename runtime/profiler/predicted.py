"""A run that was simulated, as a profile: it opens in the same reports as a measured one, beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import msgspec

from ...scheduler.timeline import Record as Happened
from ..foresight import Forecast
from .facts import header
from .recorder import Recorder
from .ring import Ring
from .schema import NONE, Category, Cause, Compute, Header, Link, Phase, Step, Tier, Transfer, Use, Wait
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
    for record in _moves(recorder, forecast.prediction.records, numbers):
        recorder.add(record)


def _modules(recorder: Recorder, forecast: Forecast) -> dict[str, int]:
    rows: dict[str, int] = {}
    for path in sorted({span.path for span in forecast.prediction.spans} | {""}):
        above = path.rpartition(".")[0]
        while above and above not in rows:
            above = above.rpartition(".")[0]
        rows[path] = recorder.module(path=path, kind="", parent=rows[above] if path else NONE)
    return rows


def _moves(
    recorder: Recorder, records: tuple[Happened, ...], numbers: dict[int, int]
) -> Iterator[Transfer | Wait | Use]:
    reads: dict[int, int] = {}
    for record in records:
        block = numbers.get(record.block, NONE)
        if record.kind == "wait":
            yield Wait(block=block, needed=record.start_ns, ready=record.end_ns)
        elif record.kind == "use":
            yield Use(block=block, at=record.start_ns, ready=record.end_ns, issued=record.issued_ns)
        elif record.kind in ("read", "copy"):
            number, reading = recorder.transfer_id(), record.kind == "read"
            parent = NONE if reading else reads.get(record.block, NONE)
            if reading:
                reads[record.block] = number
            yield Transfer(
                id=number,
                parent=parent,
                block=block,
                link=Link.DISK_READ if reading else Link.H2D,
                nbytes=record.nbytes,
                cause=Cause.DEMAND if record.urgent else Cause.PREFETCH,
                issued=record.issued_ns,
                start=record.start_ns,
                end=record.end_ns,
            )
