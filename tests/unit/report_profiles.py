"""Rich made-up profiles for the report: three tiers, training without transfers, runs of any length; and summaries."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
from profiles import footer, header

from penstock.runtime.profiler.bubble import idle_by_step
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profile import Columns, Profile
from penstock.runtime.profiler.schema import (
    Block,
    Category,
    Cause,
    Compute,
    Gauge,
    Link,
    Mark,
    MarkKind,
    Memory,
    Meter,
    Module,
    Phase,
    Record,
    Step,
    Tier,
    Transfer,
    Use,
    Wait,
)
from penstock.runtime.profiler.summary import Idle, Summary

MIB = 2**20
GIB = 2**30
MS = 1_000_000
_PARTS = (("self_attn", "Attention", 0.35), ("mlp", "GatedMLP", 0.6))
_TIMES = {"start", "end", "issued", "needed", "ready", "at", "launched"}


class _Simulation:
    """A streamed decoder: layers come from disk through host slots onto the device."""

    def __init__(self, layers: int, steps: int, seed: int, disk_gb: float) -> None:
        self.random = random.Random(seed)
        self.layers, self.steps, self.disk_gb = layers, steps, disk_gb
        self.records: list[Record] = []
        self.now = self.disk_free = self.link_free = 0
        self.number = 0

        self.modules = {
            0: Module(path="", kind="CausalLM", parent=-1),
            1: Module(path="model", kind="Decoder", parent=0),
        }
        self.of_layer: list[list[int]] = []
        for i in range(layers):
            row = len(self.modules)
            self.modules[row] = Module(path=f"model.layers.{i}", kind="DecoderLayer", parent=1)
            found = [row]
            for part, kind, _ in _PARTS:
                found.append(len(self.modules))
                self.modules[len(self.modules)] = Module(path=f"model.layers.{i}.{part}", kind=kind, parent=row)
            self.of_layer.append(found)
        self.head = len(self.modules)
        self.modules[self.head] = Module(path="lm_head", kind="Linear", parent=0)
        self.home = [Tier.DEVICE if i % 6 == 0 else Tier.HOST if i % 3 == 1 else Tier.DISK for i in range(layers)]
        self.nbytes = [(410 + 30 * (i % 3)) * MIB for i in range(layers)]
        self.slots = [0, 0, 0]

    def jitter(self, scale: float) -> float:
        return scale * self.random.lognormvariate(0, 0.12)

    def move(self, layer: int, issued: int, cause: Cause, link: Link, parent: int, earliest: int) -> tuple[int, int]:
        free = self.disk_free if link == Link.DISK_READ else self.link_free
        start = max(issued + 30_000, earliest, free)
        rate = (self.disk_gb if link == Link.DISK_READ else 22.0) * self.random.uniform(0.82, 0.98)
        end = start + int(self.nbytes[layer] / rate)
        if link == Link.DISK_READ:
            self.disk_free = end - int((end - start) * 0.25)  # the next read begins before this one ends
        else:
            self.link_free = end
        self.records.append(
            Transfer(id=self.number, block=layer, link=link, nbytes=self.nbytes[layer], cause=cause, issued=issued,
                     start=start, end=end, parent=parent)
        )  # fmt: skip
        self.number += 1
        return self.number - 1, end

    def bring(self, layer: int, step: int) -> tuple[int, int]:
        """When the layer is on the device, and when that was decided."""
        if self.home[layer] == Tier.DEVICE:
            return 0, -1
        issued = min(self.slots)
        self.slots[self.slots.index(issued)] = 1 << 62
        cause = Cause.DEMAND if self.random.random() < 0.04 else Cause.PREFETCH
        parent, there = -1, issued
        if self.home[layer] == Tier.DISK:
            parent, there = self.move(layer, issued, cause, Link.DISK_READ, -1, 0)
        _, ready = self.move(layer, issued, cause, Link.H2D, parent, max(issued, there - 8 * MS))
        return max(ready, there), issued

    def layer(self, layer: int, step: int, scale: float) -> None:
        row, *parts = self.of_layer[layer]
        ready, issued = self.bring(layer, step)
        self.records.append(Use(block=layer, at=self.now, ready=ready, issued=issued, module=row))
        if ready > self.now:
            self.records.append(Wait(block=layer, needed=self.now, ready=ready, module=row))
            self.now = ready
        began = self.now
        self.now += int(self.jitter(0.05 * MS))
        for (_, _, share), module in zip(_PARTS, parts, strict=True):
            end = self.now + int(self.jitter(share * scale))
            self.records.append(Compute(module=module, phase=Phase.FORWARD, start=self.now, end=end, depth=3))
            self.now = end
        self.records.append(Compute(module=row, phase=Phase.FORWARD, start=began, end=self.now, depth=2))
        if issued >= 0:
            self.slots[self.slots.index(1 << 62)] = self.now

    def run(self) -> None:
        self.remember()
        for step in range(self.steps):
            began = self.now
            scale = 60 * MS if step == 0 else self.jitter(9 * MS) * (3 if step == self.steps * 2 // 3 else 1)
            self.now += int(self.jitter(0.6 * MS))
            inner = self.now
            for layer in range(self.layers):
                self.layer(layer, step, scale)
                self.meter(step)
            self.records.append(Compute(module=1, phase=Phase.FORWARD, start=inner, end=self.now, depth=1))
            end = self.now + int(self.jitter(4 * MS))
            self.records.append(Compute(module=self.head, phase=Phase.FORWARD, start=self.now, end=end, depth=1))
            self.records.append(Compute(module=0, phase=Phase.FORWARD, start=began, end=end))
            self.records.append(
                Memory(at=end, tier=Tier.DEVICE, category=Category.KV, nbytes=(96 if step == 0 else 22) * MIB, module=1)
            )
            if step % 8 == 7:
                self.evict(end)
                self.records.append(Mark(at=end, kind=MarkKind.RELEARN, text=2))
            self.now = end + int(self.jitter(0.9 * MS))
            self.records.append(Step(id=step, phase=0 if step else 1, start=began, end=end, tokens=1))

    def evict(self, at: int) -> None:
        for i in range(3):
            start = at + i * 3 * MS
            self.records.append(
                Transfer(id=self.number, block=-1, link=Link.D2H, nbytes=64 * MIB, cause=Cause.EVICT, issued=at,
                         start=start, end=start + 4 * MS)
            )  # fmt: skip
            self.records.append(
                Transfer(id=self.number + 1, block=-1, link=Link.DISK_WRITE, nbytes=64 * MIB, cause=Cause.WRITEBACK,
                         issued=start, start=start + 4 * MS, end=start + 30 * MS, parent=self.number)
            )  # fmt: skip
            self.number += 2
        self.records.append(Memory(at=at, tier=Tier.DEVICE, category=Category.KV, nbytes=-150 * MIB, module=1))
        self.records.append(Memory(at=at, tier=Tier.HOST, category=Category.KV, nbytes=150 * MIB, module=1))
        self.records.append(Memory(at=at, tier=Tier.DISK, category=Category.KV, nbytes=192 * MIB, module=1))

    def remember(self) -> None:
        def held(tier: Tier, category: Category, nbytes: int, module: int = -1, at: int = 0) -> None:
            self.records.append(Memory(at=at, tier=tier, category=category, nbytes=nbytes, module=module))

        held(Tier.HOST, Category.BASELINE, 640 * MIB)
        held(Tier.HOST, Category.ARENA, 4 * 470 * MIB, at=20 * MS)
        held(Tier.DEVICE, Category.ARENA, 3 * 470 * MIB, at=30 * MS)
        for layer, home in enumerate(self.home):
            if home != Tier.DISK:
                held(home, Category.WEIGHT, self.nbytes[layer], self.of_layer[layer][0], at=(40 + 6 * layer) * MS)
        held(Tier.DEVICE, Category.BUFFER, 260 * MIB, self.head, at=35 * MS)

    def meter(self, step: int) -> None:
        weights = sum(n for n, home in zip(self.nbytes, self.home, strict=True) if home == Tier.HOST)
        ramp = min(1.0, self.now / (300 * MS))
        held = int(2520 * MIB + weights * ramp + step // 8 * 150 * MIB)
        noise = int(self.jitter(40 * MIB))
        self.records.append(Gauge(at=self.now, meter=Meter.HOST_RSS, value=held + 120 * MIB + noise))
        self.records.append(Gauge(at=self.now, meter=Meter.HOST_CGROUP, value=held + 900 * MIB + noise))
        on_device = sum(n for n, home in zip(self.nbytes, self.home, strict=True) if home == Tier.DEVICE) * ramp
        self.records.append(
            Gauge(at=self.now, meter=Meter.DEVICE_RESERVED, value=int(on_device + 1900 * MIB + step * 20 * MIB))
        )


def three_tiers(layers: int = 48, steps: int = 16, *, seed: int = 1, disk_gb: float = 6.4) -> Profile:
    """A decoder whose layers live on three tiers, with evicted KV."""
    made = _Simulation(layers, steps, seed, disk_gb)
    made.run()
    blocks = {
        i: Block(name=f"model.layers.{i}", nbytes=made.nbytes[i], home=made.home[i], module=made.of_layer[i][0])
        for i in range(layers)
    }
    head = header(
        argv=("penstock", "run", "checkpoints/decoder-32b", "--max-memory", "device=8GiB,host=12GiB"),
        capacities={"HOST": 24 * GIB, "DEVICE": 12 * GIB, "DISK": 900 * GIB},
        budgets={"HOST": 12 * GIB, "DEVICE": 8 * GIB},
        peaks={"DISK_READ": disk_gb * 1e9, "H2D": 25e9, "D2H": 24e9, "DISK_WRITE": 3.1e9},
    )
    return Profile.of(
        head, footer(recorded=len(made.records), own_ns=made.now // 150), made.records,
        modules=made.modules, blocks=blocks, strings={0: "decode", 1: "prefill", 2: "the order changed"},
    )  # fmt: skip


def training(layers: int = 12, steps: int = 8) -> Profile:
    """A plain training script: no blocks, no transfers; activations that rise and fall."""
    rand = random.Random(3)
    modules = {0: Module(path="", kind="Classifier", parent=-1)}
    modules |= {i + 1: Module(path=f"blocks.{i}", kind="Block", parent=0) for i in range(layers)}
    records: list[Record] = [
        Memory(at=0, tier=Tier.HOST, category=Category.BASELINE, nbytes=420 * MIB),
        *(Memory(at=0, tier=Tier.HOST, category=Category.WEIGHT, nbytes=28 * MIB, module=i + 1) for i in range(layers)),
    ]
    now = 0
    for step in range(steps):
        began = now
        order = [(Phase.FORWARD, i, 1) for i in range(layers)] + [(Phase.BACKWARD, i, -1) for i in range(layers)[::-1]]
        for phase, i, sign in order:
            end = now + int(rand.uniform(2.5, 3.5) * MS * (1 if sign > 0 else 2))
            records.append(Compute(module=i + 1, phase=phase, start=now, end=end, depth=1))
            records.append(
                Memory(at=end, tier=Tier.HOST, category=Category.ACTIVATION, nbytes=sign * 34 * MIB, module=i + 1)
            )
            if sign < 0 and not step:
                records.append(
                    Memory(at=end, tier=Tier.HOST, category=Category.GRADIENT, nbytes=28 * MIB, module=i + 1)
                )
            now = end
        for i in range(layers):
            end = now + int(rand.uniform(0.6, 0.9) * MS)
            records.append(Compute(module=i + 1, phase=Phase.OPTIMIZER, start=now, end=end, depth=1))
            if not step:
                records.append(
                    Memory(at=end, tier=Tier.HOST, category=Category.OPTIMIZER, nbytes=56 * MIB, module=i + 1)
                )
            now = end
            records.append(Gauge(at=now, meter=Meter.HOST_RSS, value=(500 + 28 * layers * min(4, step + 1)) * MIB))
        records.append(Step(id=step, phase=0, start=began, end=now))
        now += int(rand.uniform(4, 9) * MS)
    return Profile.of(header(budgets={}), footer(recorded=len(records)), records, modules=modules, strings={0: "train"})


def repeated(profile: Profile, times: int) -> Profile:
    """The same run over and over: a profile of any length, made without objects."""
    first, last = profile.span()
    pace = np.random.default_rng(5).uniform(0.97, 1.0, times)  # no two repetitions compress into each other
    length = last - first + 1
    columns: dict[Any, Columns] = {}
    for kind, old in profile.columns.items():
        arrays = {}
        for name in kind.__struct_fields__:
            values = getattr(old, name)
            tiled = np.tile(values, times)
            if name in _TIMES:
                shift = np.repeat(np.arange(times) * length, len(values))
                paced = (tiled * np.repeat(pace, len(values))).astype(np.int64)
                tiled = np.where(tiled < 0, tiled, paced + shift)
            elif name in ("id", "parent"):
                shift = np.repeat(np.arange(times) * (int(old.id.max()) + 1 if len(old) else 0), len(values))
                tiled = np.where(tiled < 0, tiled, tiled + shift)
            elif name == "nbytes" and kind is Memory:
                tiled[len(values) :] = np.tile(
                    np.where(old.category == Category.KV, 0, np.sign(values) * MIB), times - 1
                )
            arrays[name] = tiled
        columns[kind] = Columns(kind, arrays)
    return Profile(
        header=profile.header, footer=profile.footer, columns=columns, modules=profile.modules, blocks=profile.blocks,
        storages=profile.storages, strings=profile.strings,
    )  # fmt: skip


def idle_of(profile: Profile) -> list[tuple[int, Idle]]:
    """Where the idle time of each step went."""
    return list(idle_by_step(profile))


def summary_of(profile: Profile, **changes: Any) -> Summary:
    """The figures of a profile, with some of them changed."""
    return msgspec.structs.replace(summarise(profile), **changes)
