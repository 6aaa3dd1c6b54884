"""Recording what a GPU computes: spans from events, the allocator's meters, and no synchronisation in between."""

from pathlib import Path

import pytest
import torch
from torch import nn

from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import Category, Compute, Gauge, Memory, Meter, Phase, Step, Tier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()


def train(module: nn.Module, steps: int) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        module(torch.randn(64, 2048, device="cuda")).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


def test_spans_are_those_of_the_device(tmp_path: Path) -> None:
    module = net()
    module(torch.randn(64, 2048, device="cuda"))  # CUDA is in use before the recording begins
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        train(module, 5)
    profile = profiler.profile()
    spans = profile[Compute]
    assert {int(phase) for phase in spans.phase} == {Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER}
    assert (spans.end >= spans.start).all()
    assert (spans.launched >= 0).all()
    began, ended = profile.header.began_ns, profile.footer.written_ns
    assert (spans.start >= began - 10**6).all()
    assert (spans.end <= ended + 10**6).all()
    paths = [profile.module_path(number) for number in spans.module.tolist()]
    assert paths.count("3") == 10  # forward and backward of five steps
    forward = spans.where(spans.phase == Phase.FORWARD)
    starts = {path: [] for path in ("0", "7")}  # type: dict[str, list[int]]
    for number, start in zip(forward.module.tolist(), forward.start.tolist(), strict=True):
        if (path := profile.module_path(number)) in starts:
            starts[path].append(start)
    assert all(first < last for first, last in zip(sorted(starts["0"]), sorted(starts["7"]), strict=True))
    assert len(profile[Step]) == 5


def test_device_memory_has_names(tmp_path: Path) -> None:
    module = net()
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        train(module, 3)
    memory = profiler.profile()[Memory]
    on_device = memory.where(memory.tier == Tier.DEVICE)
    weights = sum(p.nbytes for p in module.parameters())
    for category, expected in ((Category.WEIGHT, weights), (Category.OPTIMIZER, 2 * weights)):
        assert on_device.nbytes[on_device.category == category].sum() == expected
    gauges = profiler.profile()[Gauge]
    allocated = gauges.value[gauges.meter == Meter.DEVICE_ALLOCATED]
    assert allocated.max() >= 4 * weights


@pytest.mark.parametrize("level", ["light", "full"])
def test_recording_changes_no_bit(tmp_path: Path, level: str) -> None:
    plain = train(net(), 3)
    with Profiler(tmp_path / "run.prof", level=level):  # type: ignore[arg-type]
        recorded = train(net(), 3)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
