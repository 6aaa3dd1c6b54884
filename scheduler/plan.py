"""The plan: what is decided before a run, frozen, with the time it should take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Home = Literal["device", "host", "disk"]
Computed = Literal["device", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Rates in bytes per second; None where there is no such link or it was not measured."""

    disk_read: float | None = None
    h2d: float | None = None
    d2h: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBlock:
    """One block and where it lives."""

    id: int
    name: str
    nbytes: int
    """Bytes of its tensors."""
    slot_nbytes: int
    """Bytes of the slot it takes on the tier that computes."""
    home: Home
    processor: Computed = "device"
    """What computes it: the CPU from where it lies, in calls of few tokens, or always what computes all the rest."""
    cpu_rows_below: int = 0
    """Calls of fewer tokens are computed on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What stays where, what is moved per sweep, and how long that takes at the measured rates."""

    device: str
    emulated: bool
    resident: bool
    """Everything fits: no hooks, nothing is streamed."""
    weights_nbytes: int
    blocks: tuple[PlannedBlock, ...]
    tables: tuple[str, ...]
    """Parameters served by rows."""
    host_nbytes: int
    """Host memory that is taken: arena, staging, buffers."""
    host_budget_nbytes: int
    device_nbytes: int
    device_budget_nbytes: int | None
    slots: int
    """Slots of the ring on the tier that computes."""
    slot_nbytes: int
    host_slots: int
    """Slots of the host ring on the way to a separate device."""
    host_slot_nbytes: int = 0
    disk_nbytes_per_sweep: int
    """Bytes read per sweep in which every block is used once."""
    link_nbytes_per_sweep: int
    """Bytes copied host → device per sweep of one token: blocks that the CPU computes then are not copied."""
    links: Links
    limit_nbytes: int = 0
    """What the parameters were cut by into blocks: another limit gives other blocks."""
    expert_slots: int = 0
    """Experts that are kept at a time, where they are blocks of their own: which ones is decided while it runs."""
    expert_passing: int = 0
    """Experts that can be on their way through at a time, besides; 0 where they are no blocks of their own."""
    expert_host_slots: int = 0
    """Experts that host memory keeps at a time above the disk, beside a device apart; 0 where it has all, as blocks."""
    expert_nbytes: int = 0
    """Memory that one expert takes."""
    expert_blocks: int = 0
    """How many of the blocks, the last ones, are those of experts."""
    expert_read_nbytes: int = 0
    """Of the bytes read per sweep those of experts: foreseen, or for one token if all experts were used alike."""
    expert_copied_nbytes: int = 0
    """Of the bytes copied per sweep those of experts, where they were foreseen."""
    expert_uses: float = 0.0
    """Experts that a step uses in all layers together, where they were foreseen."""
    expert_misses: float = 0.0
    """Those of them that are not where they are computed."""
    expert_hits: Mapping[str, float] = field(default_factory=dict)
    """Those that are, by why they were brought there (docs/moe.md)."""
    depth: int
    """Blocks that can be on their way or ready ahead of the one in use."""
    notes: tuple[str, ...] = ()

    def with_all_copied(self, part: float = 1.0) -> Plan:
        """The plan of calls of many rows: what the CPU computes for few of them is copied, too, or a part of it."""
        more = sum(block.nbytes for block in self.blocks if block.cpu_rows_below > 1)
        return replace(self, link_nbytes_per_sweep=self.link_nbytes_per_sweep + int(part * more))

    @property
    def first_expert(self) -> int:
        """The first block of an expert; behind the last block where there is none."""
        return len(self.blocks) - self.expert_blocks

    @property
    def terms(self) -> dict[str, float]:
        """Seconds per sweep that each link needs by itself."""
        found = {}
        if self.links.disk_read and self.disk_nbytes_per_sweep:
            found["disk"] = self.disk_nbytes_per_sweep / self.links.disk_read
        if self.links.h2d and self.link_nbytes_per_sweep:
            found["host-to-device link"] = self.link_nbytes_per_sweep / self.links.h2d
        return found

    def bound_s(self, compute_s: float = 0.0) -> float:
        """The least time per sweep: the slowest link, or the computation itself."""
        return max([compute_s, *self.terms.values()])

    def binds(self, compute_s: float = 0.0) -> str:
        """What the time of a sweep is bound by."""
        terms = {"compute": compute_s, **self.terms}
        return max(terms, key=lambda name: terms[name])

    def home_nbytes(self, home: Home) -> int:
        """Bytes of the tensors that live on a tier."""
        return sum(block.nbytes for block in self.blocks if block.home == home)

    def blocks_at(self, home: Home) -> int:
        """How many blocks live on a tier."""
        return sum(block.home == home for block in self.blocks)

    def on_cpu(self) -> tuple[PlannedBlock, ...]:
        """Blocks that the CPU computes, in calls of few tokens."""
        return tuple(block for block in self.blocks if block.processor == "cpu")

    def suggestion(self) -> str | None:
        """The one change of budget that would help most; None where nothing is streamed."""
        if self.resident:
            return None
        if self.disk_nbytes_per_sweep:
            missing = self.home_nbytes("disk") - self.expert_slots * self.expert_nbytes
            return f"{missing / 2**20:.0f} MiB more host memory would end all reading from disk"
        missing = sum(block.nbytes for block in self.blocks if block.home != "device")
        ends = "would end all copying" if self.link_nbytes_per_sweep else "would leave nothing to the CPU"
        return f"{missing / 2**20:.0f} MiB more device memory {ends}"
