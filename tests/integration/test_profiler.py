"""Recordings of real programs: what they say against what is known."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penstock
from penstock.memory.errors import UsageError
from penstock.runtime.profiler import profiler as profiler_module
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import (
    Category,
    Compute,
    Gauge,
    Link,
    Mark,
    MarkKind,
    Memory,
    Meter,
    Phase,
    Step,
    Tier,
    Transfer,
    Use,
    Wait,
)
from penstock.runtime.profiler.turns import FIRST_STEPS, RAREST, StepTurns

pytestmark = pytest.mark.usefixtures("alone")


class Net(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def live(profile: Profile, category: Category) -> dict[str, int]:
    """Bytes of a category at the end, by module path."""
    rows = profile[Memory]
    chosen = rows.where(rows.category == category)
    found: dict[str, int] = defaultdict(int)
    for module, nbytes in zip(chosen.module.tolist(), chosen.nbytes.tolist(), strict=True):
        found[profile.module_path(module)] += nbytes
    return {path: nbytes for path, nbytes in found.items() if nbytes}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()


def test_a_plain_training_is_recorded_as_it_is(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        train(net, optimizer, FIRST_STEPS)
    profile = profiler.profile()
    steps = profile[Step]
    assert len(steps) == FIRST_STEPS
    assert {profile.string(number) for number in steps.phase.tolist()} == {"train"}
    linear = 64 * 64 * 4 + 64 * 4
    weights = {f"layers.{i}.0": linear for i in range(3)} | {"head": 64 * 10 * 4 + 10 * 4}
    assert live(profile, Category.WEIGHT) == weights
    assert live(profile, Category.GRADIENT) == weights
    assert live(profile, Category.OPTIMIZER) == {path: 2 * nbytes for path, nbytes in weights.items()}
    assert live(profile, Category.ACTIVATION) == {}, "all that was saved was given back"
    spans = profile[Compute]
    calls: dict[tuple[str, int], int] = defaultdict(int)
    for module, phase in zip(spans.module.tolist(), spans.phase.tolist(), strict=True):
        calls[profile.module_path(module), phase] += 1
    for path in ("(root)", "layers.1", "layers.1.0", "layers.1.1", "head"):
        assert calls[path, Phase.FORWARD] == FIRST_STEPS
        assert calls[path, Phase.BACKWARD] == FIRST_STEPS
    assert calls["(optimizer)", Phase.OPTIMIZER] == FIRST_STEPS


def test_saved_activations_are_those_of_autograd(tmp_path: Path) -> None:
    """Against hooks of our own: the storages that autograd holds after the forward, weights left out."""
    net = Net()
    x = torch.randn(8, 64)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = net(x)
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        loss = net(x)
    del kept
    assert sum(live(profiler.profile(), Category.ACTIVATION).values()) == sum(saved.values())
    del loss


def test_recording_changes_no_bit(tmp_path: Path) -> None:
    def trained(record: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        if record:
            with Profiler(tmp_path / "run.prof", level="full"):
                train(net, optimizer, 3)
        else:
            train(net, optimizer, 3)
        return [p.detach().clone() for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_a_streamed_model_shows_its_transfers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(width=256, layers=8).eval()
    x = torch.randn(2, 256)
    expected = net(x)
    total = sum(p.nbytes for p in net.parameters())
    penstock.offload(net, max_memory={"host": total // 2}, device="cpu", disk=tmp_path / "scratch")
    try:
        with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
            before = net.penstock.statistics()
            for _ in range(5):
                assert torch.equal(net(x), expected)
            after = net.penstock.statistics()
        profile = profiler.profile()
        reads = profile[Transfer]
        assert set(reads.link.tolist()) == {int(Link.DISK_READ)}
        assert len(profile[Use]) == after.acquires - before.acquires
        assert len(profile[Wait]) == (after.late + after.demand_fetches) - (before.late + before.demand_fetches)
        assert len(profile[Step]) == 5
        names = {profile.blocks[number].name for number in reads.block.tolist()}
        assert all(name.startswith(("layers.", "head")) for name in names)
        assert profile.header.budgets == {"HOST": total // 2}
        kept = sum(live(profile, Category.WEIGHT).values())
        planned = sum(b.nbytes for b in net.penstock.plan.blocks if b.home == "host")
        assert kept == planned
        summary = profiler.summary()
        start, end = summary.window_ns
        assert summary.idle.total == end - start - summary.compute_ns
    finally:
        penstock.close(net)


def test_a_model_loaded_during_the_recording_is_found(tmp_path: Path) -> None:
    with Profiler(tmp_path / "run.prof") as profiler, torch.no_grad():
        net = Net(width=256, layers=8).eval()
        total = sum(p.nbytes for p in net.parameters())
        penstock.offload(net, max_memory={"host": total // 2}, device="cpu", disk=tmp_path / "scratch")
        net(torch.randn(2, 256))
        penstock.close(net)
    profile = profiler.profile()
    assert len(profile[Transfer]) > 0
    assert live(profile, Category.ARENA) == {}, "given back when the model was closed"
    assert live(profile, Category.WEIGHT) == {}


def test_weights_have_a_name_from_when_they_are_made(tmp_path: Path) -> None:
    with torch.no_grad(), Profiler(tmp_path / "run.prof", level="full") as profiler:
        held = profiler._recorder.live
        before = held[Tier.HOST]
        net = Net(width=256).eval()
        net.head.weight = nn.Parameter(net.layers[0][0].weight[:10].detach())  # a view: counted once, with its storage
        head = 256 * 10 * 4
        total = sum(p.nbytes for p in net.parameters()) - head
        assert held[Tier.HOST] - before == total
        net.half()
        profiler._tensors.look_again()  # as the sampler does
        assert held[Tier.HOST] - before == total // 2
        net(torch.randn(2, 256, dtype=torch.float16))
        assert held[Tier.HOST] - before == total // 2 + head // 2, "what is no view any more is counted by itself"
        profiler.step("called")
        nn.functional.linear(torch.ones(2, 256), nn.Linear(256, 8).weight)  # never called, and gone
        del net
        gc.collect()
        assert held[Tier.HOST] - before == 0
    profile = profiler.profile()
    rows = profile[Memory]
    rows = rows.where(rows.category == Category.WEIGHT)
    made = {profile.module_path(number) for number in rows.module[rows.nbytes > 0].tolist()}
    assert made == {"(Linear, not called yet)", "layers.0.0", "layers.1.0", "layers.2.0", "head"}
    assert live(profile, Category.WEIGHT) == {}
    assert live(profile, Category.ACTIVATION) == {}


def test_a_model_that_fits_has_its_names_before_its_first_call(tmp_path: Path) -> None:
    with Profiler(tmp_path / "run.prof") as profiler:
        net = Net().eval()
        penstock.offload(net, max_memory={"host": "1GiB"}, device="cpu", disk=tmp_path / "scratch")
    weights = live(profiler.profile(), Category.WEIGHT)
    assert set(weights) == {"layers.0.0", "layers.1.0", "layers.2.0", "head"}
    assert sum(weights.values()) == sum(p.nbytes for p in net.parameters())


def test_a_streamed_model_holds_what_is_planned_before_its_first_call(tmp_path: Path) -> None:
    with Profiler(tmp_path / "run.prof") as profiler:
        net = Net(width=256, layers=8).eval()
        total = sum(p.nbytes for p in net.parameters())
        penstock.offload(net, max_memory={"host": total // 2}, device="cpu", disk=tmp_path / "scratch")
        profiler._tensors.look_again()
        plan = net.penstock.plan
    profile = profiler.profile()
    assert sum(live(profile, Category.WEIGHT).values()) == sum(b.nbytes for b in plan.blocks if b.home == "host")
    assert sum(live(profile, Category.ARENA).values()) > 0
    penstock.close(net)


def test_steps_that_the_program_tells(tmp_path: Path) -> None:
    net = Net().eval()
    with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
        for _ in range(3):
            profiler.step("batch", tokens=8)
            net(torch.randn(8, 64))
            net(torch.randn(8, 64))
    profile = profiler.profile()
    assert [profile.string(number) for number in profile[Step].phase.tolist()] == ["batch"] * 3
    assert profile[Step].tokens.tolist() == [8, 8, 8]


def test_light_records_layers_and_full_records_everything(tmp_path: Path) -> None:
    net = Net().eval()
    paths = {}
    for level in ("light", "full"):
        with torch.no_grad(), Profiler(tmp_path / f"{level}.prof", level=level) as profiler:  # type: ignore[arg-type]
            net(torch.randn(8, 64))
        profile = profiler.profile()
        paths[level] = {profile.module_path(number) for number in profile[Compute].module.tolist()}
    assert paths["light"] == {"(root)", "head"} | {f"layers.{i}" for i in range(3)} | {
        f"layers.{i}.{j}" for i in range(3) for j in range(2)
    }
    assert paths["full"] == paths["light"]  # layers.i is a Sequential; its parts are layers too


def test_layers_of_short_calls_are_recorded_in_a_few_of_them_and_told_for_all(tmp_path: Path) -> None:
    net = Net().eval()
    hooked = []
    with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
        for _ in range(2 * RAREST + 2):
            net(torch.randn(8, 64))
            hooked.append(len(net.layers[0]._forward_hooks))
    assert [number for number, hooks in enumerate(hooked) if hooks] == [0, 1, RAREST + 1, 2 * RAREST + 1]
    profile = profiler.profile()
    calls = Counter(profile.module_path(number) for number in profile[Compute].module.tolist())
    assert (calls["(root)"], calls["head"]) == (2 * RAREST + 2, 2 * RAREST + 2)
    assert (calls["layers.0"], calls["layers.2.1"]) == (4, 4)
    told = {use.path: use for use in profiler.summary().modules}
    assert told["(root)"].total_ns > told["layers.1"].total_ns > told["layers.1.0"].total_ns
    assert told["layers.0"].calls > 4


def test_full_takes_turns_by_steps_with_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where looking may take no time, the first steps are looked at, and then one in RAREST."""
    monkeypatch.setattr(profiler_module, "StepTurns", partial(StepTurns, share=0.0))
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    count = RAREST + FIRST_STEPS + 2
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        train(net, optimizer, count)
    profile = profiler.profile()
    spans, steps, memory = profile[Compute], profile[Step], profile[Memory]
    assert len(steps) == count
    looked = [*range(FIRST_STEPS), RAREST + FIRST_STEPS - 1]
    edges = np.sort(steps.start)

    def steps_of(rows: Any, at: Any) -> list[int]:
        return sorted(set((np.searchsorted(edges, at[rows], side="right") - 1).tolist()))

    paths = np.array([profile.module_path(number) for number in spans.module.tolist()])
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert steps_of((paths == "layers.2.1") & (spans.phase == phase), spans.start) == looked
        assert steps_of((paths == "(root)") & (spans.phase == phase), spans.start) == list(range(count))
    saved = (memory.category == Category.ACTIVATION) & (memory.nbytes > 0)
    assert steps_of(saved, memory.at) == looked
    assert live(profile, Category.ACTIVATION) == {}
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_hooks_of_the_programs_own_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a program has hooks for saved tensors, or allows none, steps begin that are looked at and that are not."""
    monkeypatch.setattr(profiler_module, "StepTurns", partial(StepTurns, share=0.0))
    net, handed = Net(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        handed.append(tensor.shape)
        return tensor

    def run(times: int) -> None:
        for _ in range(times):
            net(torch.randn(8, 64)).sum().backward()

    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        run(FIRST_STEPS + 2)  # ours are off by now
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(1)
            each = len(handed)
            run(2 * RAREST)
        assert len(handed) == (2 * RAREST + 1) * each > 0
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            run(2 * RAREST)
        run(2 * RAREST)
    profile = profiler.profile()
    assert not (profile[Mark].kind == MarkKind.ERROR).any()
    assert live(profile, Category.ACTIVATION) == {}
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_full_takes_turns_by_calls_without_gradients(tmp_path: Path) -> None:
    net = Net().eval()
    with torch.no_grad(), Profiler(tmp_path / "tokens.prof", level="full") as profiler:
        for _ in range(2 * RAREST + 2):
            net(torch.randn(8, 64))
    calls = Counter(profiler.profile().module_path(n) for n in profiler.profile()[Compute].module.tolist())
    assert (calls["(root)"], calls["head"]) == (2 * RAREST + 2, 2 * RAREST + 2)
    assert calls["layers.0"] == calls["layers.2.1"] < RAREST
    told = {use.path: use for use in profiler.summary().modules}
    assert told["layers.2.1"].calls > calls["layers.2.1"]


def test_an_exception_is_told_and_the_file_is_complete(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path / "run.prof")

    @profiler
    def fails() -> None:
        Net()(torch.randn(1, 64))
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        fails()
    profile = profiler.profile()
    assert profile.footer.failure == "ZeroDivisionError: on purpose"
    assert profile.footer.last
    assert len(profile[Compute]) > 0


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "run.prof"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="force"), Profiler(path):
        pass
    assert path.read_bytes() == b"mine"
    with pytest.raises(UsageError, match="level"):
        Profiler(path, level="heavy")  # type: ignore[arg-type]


def test_after_the_recording_nothing_is_hooked(tmp_path: Path) -> None:
    net = Net()
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        loss = net(torch.randn(8, 64)).sum()
    records = profiler._recorder
    count = records.hooks
    loss.backward()
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 1)
    assert records.hooks == count


def test_a_gauge_tells_what_the_system_says(tmp_path: Path) -> None:
    with Profiler(tmp_path / "run.prof") as profiler:
        held = torch.ones(64 * 2**20, dtype=torch.uint8)
    gauges = profiler.profile()[Gauge]
    resident = gauges.value[gauges.meter == Meter.HOST_RSS]
    assert 60 * 2**20 <= resident[-1] - resident[0] <= 80 * 2**20
    del held


# --- prof run, PENSTOCK_PROFILE -----------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from torch import nn
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(4, 64)).sum().backward()
    optimizer.step()
print("args", sys.argv[1:])
{end}
"""


def run_script(tmp_path: Path, end: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(end=end))
    command = [sys.executable, "-m", "penstock", "prof", "run", "-o", str(tmp_path / "job.prof"), *options]
    return subprocess.run(
        [*command, str(script), "--rate", "3"], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('went wrong')", 1, "went wrong"),
        ("raise KeyError('no')", 1, "KeyError: 'no'"),
        ("import os\nif os.fork() == 0: os._exit(0)\nos.wait()", 0, ""),
        ("import os\nif os.fork() == 0: sys.exit(0)\nos.wait()", 0, ""),
    ],
)
def test_any_script(tmp_path: Path, end: str, code: int, error: str) -> None:
    done = run_script(tmp_path, end, "--level", "full")
    assert done.returncode == code, done.stderr
    assert done.stdout == "args ['--rate', '3']\n" * (2 if "fork() == 0: sys" in end and "\nargs" in done.stdout else 1)
    assert error in done.stderr
    assert "penstock/" not in done.stderr.replace("penstock prof", ""), "the traceback is the program's own"
    from penstock.runtime.profiler.reader import read_profile

    profile = read_profile(tmp_path / "job.prof")
    assert len(profile[Step]) == 3
    assert profile.footer.last


def test_prof_run_refuses(tmp_path: Path) -> None:
    (tmp_path / "job.prof").write_bytes(b"")
    done = run_script(tmp_path, "")
    assert done.returncode == 2
    assert "--force" in done.stderr or "force" in done.stderr
    command = [sys.executable, "-m", "penstock", "prof", "run", "nothing.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: there is no script nothing.py")


def test_environment_variable(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import json, torch, penstock\nfrom torch import nn\n"
        "net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).eval()\n"
        "penstock.offload(net, max_memory={'host': 2**20}, device='cpu', disk='scratch')\n"
        "with torch.no_grad(): net(torch.randn(1, 256))\n"
        "penstock.close(net)  # prefetching would read on\n"
        "print(json.dumps(net.penstock.statistics().disk_read_nbytes))\n"
    )
    environment = {**os.environ, "PENSTOCK_PROFILE": str(tmp_path / "run.prof")}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=True,
    )
    from penstock.runtime.profiler.reader import read_profile

    reads = read_profile(tmp_path / "run.prof")[Transfer]
    assert 0 < reads.nbytes.sum() <= json.loads(done.stdout)


def test_a_recorded_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
        net = Net().eval()
        x = torch.randn(2, 64)
        expected = net(x)
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x), expected)
        torch.save(net, tmp_path / "net.pt")
        assert torch.equal(net(x), expected)
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)
    calls: dict[str, int] = defaultdict(int)
    profile = profiler.profile()
    for module in profile[Compute].module.tolist():
        calls[profile.module_path(module)] += 1
    assert calls["(root)"] == 2
    assert calls["2:"] == 1, "the copy is a root of its own"
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_only_recorded_modules_carry_hooks(tmp_path: Path) -> None:
    """A hook costs microseconds on every call: a global one is there only while there is something to find."""
    from torch.nn.modules import module as torch_module

    net = Net().eval()
    with torch.no_grad(), Profiler(tmp_path / "run.prof"):
        net(torch.randn(1, 64))
        assert not torch_module._global_forward_pre_hooks
        later = Net().eval()
        assert len(torch_module._global_forward_pre_hooks) == 1
        later(torch.randn(1, 64))
        assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks
