"""What a recording must leave as it is: results, errors, memory and threads of the program."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penstock.memory.errors import UsageError
from penstock.runtime.profiler import profiler as profiler_module
from penstock.runtime.profiler import sampling
from penstock.runtime.profiler.environment import start_if_asked
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import Category, Compute, Mark, MarkKind, Memory, Phase, Step
from penstock.runtime.profiler.tensors import TensorWatch
from penstock.runtime.profiler.turns import FIRST_STEPS, StepTurns


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, error: BaseException | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sigmoid()
            if error is not None:
                raise error
        return x


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Profiler]:
    """A profiler that is recording; nothing may have gone wrong in it."""
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        yield profiler
    rows = profiler.profile()[Mark]
    assert not (rows.kind == MarkKind.ERROR).any(), "a hook failed"


def spans(profile: Profile, phase: Phase) -> list[tuple[int, int, int, str]]:
    """Start, end, depth and path of the spans of a phase; the path without the number of its root."""
    rows = profile[Compute]
    chosen = rows.where(rows.phase == phase)
    paths = [profile.modules[number].path.rpartition(":")[2] for number in chosen.module.tolist()]
    return sorted(zip(chosen.start.tolist(), chosen.end.tolist(), chosen.depth.tolist(), paths, strict=True))


def ended(profiler: Profiler) -> Profile:
    """The profile of a recording that a fixture began, ended now."""
    profiler._writer.add_own_ns(0)
    profiler.__exit__(None, None, None)
    profile = profiler.profile()
    profiler._force = True
    profiler.__enter__()
    return profile


# --- errors are the program's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_forward_that_raises_is_followed_by_others(full: Profiler, error: type[BaseException]) -> None:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), pytest.raises(error):
            net(torch.randn(2, 16), error())
    with torch.no_grad():
        net(torch.randn(2, 16))
        net(torch.randn(2, 16))
    profile = ended(full)
    found = [path for _, _, depth, path in spans(profile, Phase.FORWARD) if depth == 0]
    assert found == [""] * (3 if issubclass(error, Exception) else 2)
    assert len(profile[Step]) == 3


def test_a_change_in_place_is_refused_as_ever(full: Profiler) -> None:
    net = Net()
    loss = net(torch.randn(2, 16)).sum()
    with torch.no_grad():
        net.layers[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    x = torch.randn(3, requires_grad=True).exp()
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_that_is_dropped_frees_its_memory(full: Profiler) -> None:
    gc.disable()
    try:
        y = (torch.randn(8, requires_grad=True) * 2).exp()
        gone = weakref.ref(y)
        del y
        assert gone() is None
        live = full._recorder.live
        before = dict(live)
        kept = Net()(torch.randn(64, 16))
        assert live != before
        del kept
    finally:
        gc.enable()
    rows = ended(full)[Memory]
    assert rows.where(rows.category == Category.ACTIVATION).nbytes.sum() == 0


def test_functional_transforms_work(full: Profiler) -> None:
    net = Net()
    x = torch.randn(4, 16)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, values, (row,)).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.func.grad(loss)(parameters, x)
    assert torch.allclose(each["layers.0.weight"].sum(0), whole["layers.0.weight"], atol=1e-5)
    changed = {name: p - 0.1 for name, p in net.named_parameters()}  # not leaves
    torch.func.functional_call(net, changed, (x,)).sum().backward()
    rows = ended(full)[Memory]
    weights = rows.where(rows.category == Category.WEIGHT)
    assert weights.nbytes.sum() in (0, sum(p.nbytes for p in net.parameters()))


def test_compiled_modules_compile_whole(full: Profiler) -> None:
    net = Net()
    for compiled in (
        torch.compile(net, backend="eager", fullgraph=True),
        torch.compile(net, backend="aot_eager", fullgraph=True),
    ):
        x = torch.randn(2, 16)
        found = compiled(x)
        assert torch.allclose(found, net(x))
        found.sum().backward()
    torch._dynamo.reset()


def test_traced_and_scripted_modules(full: Profiler) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    x = torch.randn(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced, scripted = torch.jit.trace(net, x), torch.jit.script(net)
    assert torch.equal(traced(x), net(x))
    scripted(x).sum().backward()
    outer = nn.Sequential(scripted, nn.Linear(16, 4))
    for _ in range(5):
        outer(x).sum().backward()


def test_second_derivatives_are_the_same(tmp_path: Path) -> None:
    def penalty() -> torch.Tensor:
        torch.manual_seed(0)
        net = Net()
        x = torch.randn(2, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return net.layers[0].weight.grad

    expected = penalty()
    with Profiler(tmp_path / "run.prof", level="full"):
        assert torch.equal(penalty(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_no_roots(full: Profiler, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: torch.Tensor, error: BaseException | None = None) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    net = Checkpointed()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.randn(2, 16, requires_grad=True)).sum().backward()
        optimizer.step()
    profile = ended(full)
    assert len(profile[Step]) == 2


def test_modules_that_are_not_finished_do_no_harm(tmp_path: Path) -> None:
    raw = Net.__new__(Net)
    lazy = nn.LazyLinear(4)
    with Profiler(tmp_path / "run.prof") as profiler:
        lazy(torch.randn(2, 3))
    assert not (profiler.profile()[Mark].kind == MarkKind.ERROR).any()
    del raw


def test_other_collections_are_not_read(full: Profiler) -> None:
    class Counting(list):  # type: ignore[type-arg]
        pass

    class Pass(nn.Module):
        def forward(self, *values: object) -> torch.Tensor:
            return torch.zeros(1)

    endless: list[object] = []
    endless.append(endless)
    Pass()(range(10**12), endless, Counting())


# --- records are right --------------------------------------------------------------------------------------------


def test_backward_spans_nest(full: Profiler) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden).relu()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden=x)

    net = nn.Sequential(*(Layer() for _ in range(3)))
    net(torch.randn(4, 16)).sum().backward()
    found = spans(ended(full), Phase.BACKWARD)
    assert len(found) == 10
    for start, end, depth, path in found:
        for other_start, other_end, other_depth, other_path in found:
            if start < other_end and other_start < end and path != other_path:
                assert depth != other_depth, (path, other_path)
                outer, inner = sorted([(depth, start, end), (other_depth, other_start, other_end)])
                assert outer[1] <= inner[1], (path, other_path)
                assert inner[2] <= outer[2], (path, other_path)


def test_backward_is_recorded_as_often_as_it_runs(full: Profiler) -> None:
    net = Net()
    loss = net(torch.randn(4, 16)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()  # raises in the midst of the pass
    net(torch.randn(4, 16)).sum().backward()
    found = [path for *_, path in spans(ended(full), Phase.BACKWARD)]
    assert found.count("layers.0") == 3


def test_threads_do_not_disturb_each_other(full: Profiler) -> None:
    nets = [Net() for _ in range(4)]
    failures: list[BaseException] = []

    def work(net: Net) -> None:
        try:
            for _ in range(20):
                net(torch.randn(4, 16)).sum().backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    profile = ended(full)
    roots = [path for _, _, depth, path in spans(profile, Phase.FORWARD) if depth == 0]
    assert len(roots) == 80
    assert sorted(path for _, _, depth, path in spans(profile, Phase.BACKWARD) if depth == 0) == sorted(roots)


def test_a_root_is_found_while_another_thread_is_in_a_step_that_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In such a step of a program with one thread, nobody is looked for within a root."""
    monkeypatch.setattr(profiler_module, "StepTurns", partial(StepTurns, share=0.0))
    inside, found = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: object) -> None:
        inside.set()
        assert found.wait(60)

    def call_another() -> None:
        assert inside.wait(60)
        second(torch.randn(4, 16))
        found.set()

    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        first, second = Net(), Net()
        for _ in range(FIRST_STEPS + 1):
            first(torch.randn(4, 16))
        first.layers[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=call_another)
        thread.start()
        first(torch.randn(4, 16))
        thread.join()
    roots = [path for _, _, depth, path in spans(profiler.profile(), Phase.FORWARD) if depth == 0]
    assert len(roots) == FIRST_STEPS + 1 + 2


def test_losses_and_several_optimizers_are_one_step(full: Profiler) -> None:
    net = Net()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in net.layers]
    for _ in range(3):
        loss = nn.MSELoss()(net(torch.randn(4, 16)), torch.zeros(4, 16))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    profile = ended(full)
    assert len(profile[Step]) == 3
    last = profile[Step].end.tolist()[-1]
    assert all(end <= last for _, end, _, _ in spans(profile, Phase.OPTIMIZER))
    assert sum(module.kind == "MSELoss" for module in profile.modules.values()) == 1


def test_an_optimizer_with_a_closure(full: Profiler) -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(4, 16)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        optimizer.step(closure)
    profile = ended(full)
    assert len(profile[Step]) == 2
    assert len(spans(profile, Phase.OPTIMIZER)) == 2


def live(profile: Profile, category: Category) -> int:
    rows = profile[Memory]
    return int(rows.where(rows.category == category).nbytes.sum())


def test_what_is_gone_is_given_back(full: Profiler) -> None:
    for _ in range(2):
        net = Net()
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(2):
            loss = net(torch.randn(4, 16)).sum()
            optimizer.zero_grad()  # between forward and backward: gradients come to lie elsewhere
            loss.backward()
            optimizer.step()
        assert full._recorder.live
        del net, optimizer, loss
        gc.collect()
    Net()(torch.randn(4, 16))
    gc.collect()
    profile = ended(full)
    for category in (Category.WEIGHT, Category.GRADIENT, Category.OPTIMIZER, Category.ACTIVATION):
        assert live(profile, category) == 0, category


def test_a_model_that_is_converted_is_counted_anew(full: Profiler) -> None:
    net = Net()
    net(torch.randn(2, 16))
    net.double()
    net(torch.randn(2, 16).double())
    assert live(ended(full), Category.WEIGHT) == sum(p.nbytes for p in net.parameters())


def test_sparse_gradients_are_counted(full: Profiler) -> None:
    table = nn.Embedding(100, 8, sparse=True)
    table(torch.tensor([1, 2, 3])).sum().backward()
    gradient = table.weight.grad
    assert live(ended(full), Category.GRADIENT) == gradient._indices().nbytes + gradient._values().nbytes


def test_caches_of_two_models(full: Profiler) -> None:
    class Layer:
        def __init__(self, length: int) -> None:
            self.keys = self.values = torch.zeros(length)

    class Cache:
        def __init__(self) -> None:
            self.layers = [Layer(1)]

    class Output:
        def __init__(self, cache: Cache) -> None:
            self.past_key_values = cache

    class Model(nn.Linear):
        def forward(self, cache: Cache, length: int) -> Output:  # type: ignore[override]
            cache.layers = [Layer(length)]
            return Output(cache)

    draft, target = Model(2, 2), Model(2, 2)
    caches = Cache(), Cache()
    for length in (100, 200, 150):
        draft(caches[0], length)
        target(caches[1], 10 * length)
    assert full._recorder is not None
    profile = ended(full)
    assert live(profile, Category.KV) == 2 * 4 * (150 + 1500)
    del caches


# --- one recording at a time --------------------------------------------------------------------------------------


def test_a_second_recording_is_refused(full: Profiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="recorded already"), Profiler(tmp_path / "other.prof"):
        pass
    assert not (tmp_path / "other.prof").exists()
    monkeypatch.setenv("PENSTOCK_PROFILE", str(tmp_path / "third.prof"))
    start_if_asked()
    assert "PENSTOCK_PROFILE" not in os.environ
    assert not (tmp_path / "third.prof").exists()


def test_decorated_functions(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path / "run.prof")

    @profiler
    def count_down(number: int) -> int:
        Net()(torch.randn(1, 16))
        return count_down(number - 1) if number else 7

    assert count_down(2) == 7
    assert len([1 for _, _, depth, _ in spans(profiler.profile(), Phase.FORWARD) if depth == 0]) == 3
    assert count_down(0) == 7
    assert len([1 for _, _, depth, _ in spans(profiler.profile(), Phase.FORWARD) if depth == 0]) == 1

    @Profiler(tmp_path / "pieces.prof")
    def pieces() -> Iterator[int]:
        for number in range(3):
            Net()(torch.randn(1, 16))
            yield number

    assert list(pieces()) == [0, 1, 2]
    assert len(Profiler(tmp_path / "pieces.prof").profile()[Step]) == 3

    @Profiler(tmp_path / "later.prof")
    async def later() -> int:
        Net()(torch.randn(1, 16))
        return 1

    assert asyncio.run(later()) == 1
    assert len(Profiler(tmp_path / "later.prof").profile()[Step]) == 1


def test_another_folder_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Profiler("run.prof") as profiler:
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
    assert profiler.profile().footer.last


def test_gradients_are_read_by_the_thread_that_computes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward exchanges them without Python's lock: another thread that reads one may read what is gone."""
    readers: set[int] = set()
    look = TensorWatch._look_at_gradient

    def noted(self: TensorWatch, *args: Any) -> None:
        readers.add(threading.get_ident())
        look(self, *args)

    monkeypatch.setattr(TensorWatch, "_look_at_gradient", noted)
    monkeypatch.setitem(sampling.INTERVAL_S, "light", 1e-3)
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with Profiler(tmp_path / "a.prof") as profiler:
        deadline = time.monotonic() + 0.3  # hundreds of turns of the thread that reads meters
        while time.monotonic() < deadline:
            optimizer.zero_grad()
            net(torch.ones(2, 8)).sum().backward()
            optimizer.step()
    assert readers == {threading.get_ident()}
    rows = profiler.profile()[Memory]
    gradients = rows.where(rows.category == Category.GRADIENT)
    assert gradients.nbytes[gradients.nbytes > 0].sum() >= 10 * sum(p.nbytes for p in net.parameters())
