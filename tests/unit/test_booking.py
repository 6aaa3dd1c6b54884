"""What a model books before it takes it: budgets that are left to others, drives, and what a refusal leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock.memory.capacity import DiskCapacity, HostCapacity, host_capacity
from penstock.memory.ledger import Ledger
from penstock.memory.scratch import ScratchFolders
from penstock.runtime import launch, offloading, tiers
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.runtime.links import LinkCache
from penstock.runtime.tiers import Wanted, reserve, resolve_budgets

GIB = 2**30


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """An empty ledger on a machine that can give 12 GiB, or 14 if it drops what it caches."""
    made = Ledger()
    capacity = replace(host_capacity(), available_nbytes=12 * GIB, obtainable_nbytes=14 * GIB)

    def machine() -> HostCapacity:
        return capacity

    monkeypatch.setattr(tiers, "process_ledger", lambda: made)
    monkeypatch.setattr(tiers, "host_capacity", machine)
    return made


def test_two_threads_do_not_book_the_same_memory(ledger: Ledger) -> None:
    """The second model is planned while the first one has booked its memory, and has not made its arena yet."""
    first = reserve("first", CpuDevice(), host_nbytes=10 * GIB, device_nbytes=0)
    with pytest.raises(penstock.DoesNotFitError, match=r"first holds 10.00 GiB"):
        reserve("second", CpuDevice(), host_nbytes=10 * GIB, device_nbytes=0)
    budgets = resolve_budgets(
        Wanted(host=None, device=None), CpuDevice(), headroom_nbytes=GIB, disk_rate=None, link_rate=None
    )
    assert budgets.host == 1 * GIB
    first[0].release()
    reserve("second", CpuDevice(), host_nbytes=10 * GIB, device_nbytes=0)


def test_page_cache_in_use_is_left_alone_by_auto_and_no_reason_to_refuse(ledger: Ledger) -> None:
    wanted = Wanted(host=None, device=None)
    budgets = resolve_budgets(wanted, CpuDevice(), headroom_nbytes=0, disk_rate=None, link_rate=None)
    assert budgets.host == 12 * GIB
    with pytest.raises(penstock.DoesNotFitError):
        reserve("model", CpuDevice(), host_nbytes=14 * GIB + 1, device_nbytes=0)
    reserve("model", CpuDevice(), host_nbytes=14 * GIB, device_nbytes=0)


def test_an_emulated_device_takes_its_memory_from_the_host(ledger: Ledger) -> None:
    device = EmulatedDevice(Rates())
    try:
        wanted = Wanted(host=None, device=8 * GIB)
        budgets = resolve_budgets(wanted, device, headroom_nbytes=GIB, disk_rate=None, link_rate=None)
        assert budgets.host <= 3 * GIB
        reserve("model", device, host_nbytes=budgets.host, device_nbytes=8 * GIB)
        assert ledger.untouched("host") == budgets.host + 8 * GIB, "not the host's arena alone"
    finally:
        device.close()


def test_folders_on_one_drive_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def capacity(folder: Path) -> DiskCapacity:
        return DiskCapacity(
            folder=str(folder), total_nbytes=20 * GIB, free_nbytes=10 * GIB, filesystem="ext4", in_memory=False
        )

    monkeypatch.setattr(launch, "disk_capacity", capacity)
    folders = ScratchFolders()
    with folders.open(tmp_path / "one") as one, folders.open(tmp_path / "two") as two:
        launch.check_room([one, two], 10 * GIB, None)
        with pytest.raises(penstock.DiskError, match=rf"{15 * GIB} bytes .* where {10 * GIB} bytes are free"):
            launch.check_room([one, two], 15 * GIB, None)


class Scaled(nn.Module):
    """Layers and a buffer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))
        self.register_buffer("scale", torch.full((512,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale
        return x


def test_a_refusal_leaves_buffers_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = EmulatedDevice(Rates())
    device.torch_device = torch.device("meta")  # as far from the host as a GPU

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise penstock.DoesNotFitError("full", tier="device", needed_nbytes=2, available_nbytes=1)

    monkeypatch.setattr(offloading, "launch", refuse)
    module = Scaled()
    with pytest.raises(penstock.DoesNotFitError, match="full"):
        offloading.offload(
            module,
            wanted=Wanted(host=GIB, device=5 * 2**20),
            device=device,
            disk=[str(tmp_path)],
            context=None,
            batch=None,
            cache=LinkCache(tmp_path / "links.json"),
        )
    assert module.scale.device.type == "cpu"
    assert torch.equal(module.scale, torch.full((512,), 0.5))


def test_a_profile_that_is_there_costs_a_built_module_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "run.prof"
    there.write_text("another run's")
    monkeypatch.setenv("PENSTOCK_PROFILE", str(there))
    module = Scaled()
    x = torch.ones(2, 512)
    expected = module(x)
    with pytest.raises(penstock.UsageError, match=r"run\.prof"):
        penstock.offload(module, max_memory={"host": "5MiB"}, device="cpu", disk=tmp_path)
    assert torch.equal(module(x), expected)
    assert there.read_text() == "another run's"
