"""Recording what a GPU computes: spans from events, the allocator's meters, and no synchronisation in between."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.reader import read_profile
from penstock.runtime.profiler.schema import (
    Category,
    Compute,
    Gauge,
    Launches,
    Mark,
    Memory,
    Meter,
    Phase,
    Step,
    Tier,
)

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


SCRIPT = """
import os
import time
os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # obeyed only where nobody has asked CUDA before
import torch
from torch import nn

assert not torch.cuda.is_initialized()
pid = os.fork()
if pid == 0:  # a child may use CUDA where its parent has not
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
model(torch.ones(8, 512))
assert not torch.cuda.is_initialized()
model.cuda()
time.sleep(0.05)  # the sampler may have looked just before
for _ in range(20):
    model(torch.ones(8, 512, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("level", ["light", "full"])
def test_a_script_is_the_first_to_use_cuda(tmp_path: Path, level: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "penstock", "prof", "run", "-o", "run.prof", "--level", level, "script.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    profile = read_profile(tmp_path / "run.prof")
    assert torch.cuda.get_device_name(0) in profile.header.machine["gpu"]
    assert profile.header.capacities["DEVICE"] == torch.cuda.get_device_properties(0).total_memory
    launched = profile[Compute].launched
    assert (launched < 0).any(), "the first call was the host's"
    assert (launched >= 0).sum() >= 20, "and the others the device's"
    assert Meter.DEVICE_ALLOCATED in profile[Gauge].meter.tolist()
    assert not complaints(profile)


def complaints(profile: Profile) -> list[str]:
    marks = [profile.string(number) for number in profile[Mark].text.tolist()]
    return [mark for mark in marks if mark.startswith("recorder:")]


@pytest.mark.parametrize("level", ["light", "full"])
def test_a_graph_is_captured_while_it_is_recorded(tmp_path: Path, level: str) -> None:
    module = net()
    x = torch.randn(64, 2048, device="cuda")
    with torch.no_grad(), Profiler(tmp_path / "run.prof", level=level) as profiler:  # type: ignore[arg-type]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = module(x)
        torch.cuda.current_stream().wait_stream(side)
        for _ in range(20):  # the mode "global", in which CUDA minds what all threads do
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = module(x)
                time.sleep(0.06)  # the sampler looks at its events meanwhile
            graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(answer, expected)
    profile = profiler.profile()
    assert not complaints(profile)
    assert (profile[Compute].launched >= 0).any()
    used = profile[Gauge].meter == Meter.DEVICE_USED
    assert used.sum() >= 3, "the meters go on"


def test_clocks_agree_over_a_while(tmp_path: Path) -> None:
    module = net()
    x = torch.randn(64, 2048, device="cuda")
    calls: list[tuple[int, int]] = []
    with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
        for _ in range(60):
            torch.cuda.synchronize()
            before = time.monotonic_ns()
            module(x)
            torch.cuda.synchronize()
            calls.append((before, time.monotonic_ns()))
            time.sleep(0.1)
    profile = profiler.profile()
    spans = profile[Compute]
    roots = spans.where((spans.depth == 0) & (spans.launched >= 0))
    assert len(roots) == len(calls)
    # The device computed while the host waited for it: within what the clocks agree to, and no more.
    for (before, after), start, end in zip(calls, roots.start.tolist(), roots.end.tolist(), strict=True):
        assert before - 100_000 <= start <= end <= after + 100_000


def test_launches_are_traced_over_a_few_steps(tmp_path: Path) -> None:
    module = net()
    x = torch.randn(64, 2048, device="cuda")
    with torch.no_grad(), Profiler(tmp_path / "run.prof", level="full") as profiler:
        for _ in range(30):
            profiler.step("forward")
            module(x)
    profile = profiler.profile()
    assert not complaints(profile)
    launches = profile[Launches]
    assert len(launches) == 1, "once in a recording"
    assert launches.steps.tolist() == [3]
    assert launches.launches[0] >= 3 * 8, "a kernel or more for each layer"
    assert 0 < launches.queued[0] < 10**9 * launches.launches[0]
    found = profiler.summary()
    assert (found.tklqt_ns, found.tklqt_steps) == (int(launches.queued[0]), 3)


def test_a_program_may_trace_itself(tmp_path: Path) -> None:
    module = net()
    x = torch.randn(64, 2048, device="cuda")
    with torch.no_grad(), Profiler(tmp_path / "run.prof", level="full") as profiler:
        for _ in range(5):
            profiler.step("forward")
            module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as traced:
            module(x)
            torch.cuda.synchronize()
    assert any(event.key.startswith("cudaLaunch") for event in traced.key_averages())
    assert not complaints(profiler.profile())
