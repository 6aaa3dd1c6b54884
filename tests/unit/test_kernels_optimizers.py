"""Updates of flat arrays: the bits of torch's optimizers, wherever the arrays are cut."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.adamw import ADAMW, AdamWHyper
from penstock.kernels.lion import LION, LionHyper
from penstock.kernels.norms import clip_coefficient, gradient_norm, total_norm
from penstock.kernels.optimizer import GRADIENT_DTYPES, Clip, Optimizer, splits_exactly
from penstock.kernels.optimizers import optimizer, optimizers
from penstock.kernels.scratch import ALONE, GRAIN, SUBCHUNK, Scratch
from penstock.kernels.sgd import SGD, SGDHyper

pytestmark = pytest.mark.usefixtures("every_core")

HYPERS = [
    AdamWHyper(),
    AdamWHyper(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    AdamWHyper(lr=0.0, betas=(0.0, 0.0), eps=0.1, weight_decay=0.0),
    AdamWHyper(betas=(0.3, 0.5)),  # a weight of lerp above a half takes torch's other formula
    SGDHyper(),
    SGDHyper(lr=0.1, weight_decay=0.01),
    SGDHyper(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    SGDHyper(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    LionHyper(),
    LionHyper(lr=1e-2, betas=(0.95, 0.98), weight_decay=0.5),
]
OF = {AdamWHyper: ADAMW, SGDHyper: SGD, LionHyper: LION}
dtypes = st.sampled_from(GRADIENT_DTYPES)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What a comparison must see: −0 is not 0, and a NaN is a NaN whatever its sign and payload."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor.detach())
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(got, wanted, strict=True))


class Lion(torch.optim.Optimizer):
    """Program 1 of the paper, one line each, on whole tensors."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr, weight_decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                with torch.no_grad():
                    p.mul_(1 - lr * weight_decay)
                    update = momentum.clone().mul_(beta1).add(p.grad, alpha=1 - beta1).sign_()
                    p.add_(update, alpha=-lr)
                    momentum.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def resident(hyper: Any, param: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The reference: what one would train the fp32 master with."""
    if isinstance(hyper, AdamWHyper):
        return torch.optim.AdamW([param], **asdict(hyper))
    if isinstance(hyper, SGDHyper):
        return torch.optim.SGD([param], **asdict(hyper))
    return Lion([param], asdict(hyper))


def values(count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of many magnitudes and both signs, some of them zeros of both signs."""
    made = torch.randn(count, generator=generator) * 10 ** (4 * torch.rand(count, generator=generator) - 3)
    return torch.where(torch.rand(count, generator=generator) < 0.02, made * 0, made)


def cut(count: int, cuts: Sequence[int]) -> list[slice]:
    edges = sorted({0, count, *(c % (count + 1) for c in cuts)})
    return [slice(a, b) for a, b in pairwise(edges)]


class Flat:
    """Master and states as flat arrays that are updated piece by piece."""

    def __init__(self, master: torch.Tensor, hyper: Any, elements: int = GRAIN) -> None:
        self.optimizer: Optimizer[Any] = OF[type(hyper)]
        self.names = self.optimizer.states_of(hyper)
        self.master = master.clone()
        self.states = [torch.zeros_like(master) for _ in self.names]
        self.scratch = Scratch.of(elements)

    def step(self, grad: torch.Tensor, hyper: Any, step: int, pieces: Sequence[slice], **how: Any) -> None:
        out = how.pop("out", None)
        for piece in pieces:
            self.optimizer.update(
                self.master[piece],
                [state[piece] for state in self.states],
                grad[piece],
                hyper,
                step=step,
                scratch=self.scratch,
                out=None if out is None else out[piece],
                **how,
            )

    def equals(self, param: torch.nn.Parameter, reference: torch.optim.Optimizer) -> bool:
        got = [self.master, *self.states]
        wanted = [param.data, *(reference.state[param][name] for name in self.names)]
        if reference.param_groups[0].get("betas", (1, 1))[0] == 0:
            # lerp to all of the gradient gives zeros of another sign at the end of an array than before it
            got, wanted = [a + 0.0 for a in got], [a + 0.0 for a in wanted]
        return same(got, wanted)


@pytest.mark.parametrize("hyper", HYPERS, ids=repr)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 63, 1000, 2 * ALONE + 37])
def test_as_torch_after_twenty_steps(hyper: Any, dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    param = torch.nn.Parameter(values(count, generator))
    reference, flat = resident(hyper, param), Flat(param.data, hyper, ALONE)
    out = torch.empty(count, dtype=dtype)
    for step in range(1, 21):
        grad = values(count, generator).to(dtype)
        param.grad = grad.float()
        reference.step()
        kept = grad.clone()
        flat.step(grad, hyper, step, [slice(None)], out=out)
        assert same([grad], [kept])
    assert flat.equals(param, reference)
    assert same([out], [param.data.to(dtype)])


@given(
    hyper=st.sampled_from(HYPERS),
    dtype=dtypes,
    count=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    skew=st.integers(0, 20),
)
@settings(max_examples=150)
def test_wherever_it_is_cut(
    hyper: Any, dtype: torch.dtype, count: int, cuts: list[int], steps: int, seed: int, skew: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(values(count, generator))
    reference, flat = resident(hyper, param), Flat(values(count + skew, generator)[skew:], hyper)
    flat.master.copy_(param.data)
    store = torch.empty(count + skew, dtype=dtype)
    for step in range(1, steps + 1):
        grad = values(count + skew, generator).to(dtype)[skew:]  # at any address
        param.grad = grad.float()
        reference.step()
        flat.step(grad, hyper, step, cut(count, cuts), out=store[skew:])
    assert flat.equals(param, reference)
    assert same([store[skew:]], [flat.master.to(dtype)])


unit = st.floats(1e-6, 1, exclude_max=True)  # 1 - beta is not 1: zeros would get another sign in what is left over
rate = st.floats(0, 10, allow_subnormal=False)
any_hyper = st.one_of(
    st.builds(AdamWHyper, lr=rate, betas=st.tuples(unit, unit), eps=st.floats(1e-12, 10), weight_decay=rate),
    st.builds(SGDHyper, lr=rate, momentum=rate, dampening=st.floats(-2, 2), weight_decay=rate),
    st.builds(SGDHyper, lr=rate, momentum=st.floats(0.01, 2), nesterov=st.just(True), weight_decay=rate),
    st.builds(LionHyper, lr=rate, betas=st.tuples(unit, unit), weight_decay=rate),
)


@given(hyper=any_hyper, lrs=st.lists(rate, min_size=1, max_size=4), dtype=dtypes, seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_any_hyperparameters_and_schedules(hyper: Any, lrs: list[float], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(values(201, generator))
    reference, flat = resident(hyper, param), Flat(param.data, hyper)
    for step, lr in enumerate(lrs, start=1):
        (group,) = reference.param_groups
        group["lr"] = lr
        now = flat.optimizer.hyper_of(group)
        assert now == replace(hyper, lr=lr)
        grad = values(201, generator).to(dtype)
        param.grad = grad.float()
        reference.step()
        flat.step(grad, now, step, cut(201, [77]))
    assert flat.equals(param, reference)


@given(dtype=dtypes, of=st.sampled_from([None, torch.float32]), value=st.floats(0, 1), widen=st.booleans())
def test_clipped_as_torch_does(dtype: torch.dtype, of: torch.dtype | None, value: float, widen: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    grad = values(500, generator).to(dtype)
    coefficient = torch.tensor(value, dtype=of or dtype)
    param, hyper = torch.nn.Parameter(values(500, generator)), AdamWHyper()
    reference, flat = resident(hyper, param), Flat(param.data, hyper)
    if widen:
        param.grad = grad.float() * coefficient
    else:
        param.grad = (grad * coefficient).float()
    reference.step()
    flat.step(grad, hyper, 1, cut(500, [33, 101]), clip=Clip(coefficient=coefficient, widen=widen))
    assert flat.equals(param, reference)


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_with_clip_grad_norm(widen: bool, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hyper, shapes = AdamWHyper(), [(3, 50), (7,), (20, 11)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    grads = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    held = [torch.nn.Parameter(g.float() if widen else g.clone()) for g in grads]
    for h, g in zip(held, grads, strict=True):
        h.grad = g.float() if widen else g.clone()
    torch.nn.utils.clip_grad_norm_(held, max_norm)
    total = total_norm([gradient_norm(g.float() if widen else g) for g in grads])
    clip = Clip(coefficient=clip_coefficient(total, max_norm), widen=widen)
    for param, h, g in zip(params, held, grads, strict=True):
        reference, flat = resident(hyper, param), Flat(param.data.flatten(), hyper)
        assert h.grad is not None
        param.grad = h.grad.float()
        reference.step()
        flat.step(g.flatten(), hyper, 1, [slice(None)], clip=clip)
        assert same([flat.master.view_as(param)], [param.data])


def test_infinities_and_nans_go_where_torch_puts_them() -> None:
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3e38, 1e-45, -1e-40] * 9)
    for hyper in HYPERS:
        param = torch.nn.Parameter(torch.ones_like(special))
        reference, flat = resident(hyper, param), Flat(param.data, hyper)
        for step in (1, 2):
            param.grad = special.clone()
            reference.step()
            flat.step(special, hyper, step, cut(len(special), [5]))
        assert flat.equals(param, reference)


@pytest.mark.parametrize("hyper", HYPERS, ids=repr)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_the_probe_agrees(hyper: Any, dtype: torch.dtype) -> None:
    assert splits_exactly(OF[type(hyper)], hyper, dtype)


def test_the_probe_sees_a_difference() -> None:
    def depends_on_length(master: torch.Tensor, *_: Any) -> None:
        master.add_(1.0 if len(master) > 1 else 1.0000002)

    assert not splits_exactly(replace(LION, rule=depends_on_length), LionHyper())


def test_two_threads_with_a_scratch_each() -> None:
    count, hyper = 8 * ALONE + 11, AdamWHyper()
    generator = torch.Generator().manual_seed(5)
    param = torch.nn.Parameter(values(count, generator))
    grad = values(count, generator).bfloat16()
    param.grad = grad.float()
    reference = resident(hyper, param)
    reference.step()
    halves = [Flat(param.data[:0], hyper, ALONE) for _ in range(2)]
    master = values(count, torch.Generator().manual_seed(5))
    states = [torch.zeros(count) for _ in range(2)]

    def work(index: int) -> None:
        here = slice(0, count // 2) if index == 0 else slice(count // 2, count)
        halves[index].master, halves[index].states = master[here], [state[here] for state in states]
        halves[index].step(grad[here], hyper, 1, [slice(None)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same([master, *states], [param.data, *(reference.state[param][n] for n in ADAMW.states_of(hyper))])


def test_bytes_and_names() -> None:
    assert list(optimizers()) == ["adamw", "sgd", "lion"]
    assert optimizer("adamw") is ADAMW
    assert (ADAMW.nbytes_per_element(AdamWHyper()), LION.nbytes_per_element(LionHyper())) == (12, 8)
    assert SGD.nbytes_per_element(SGDHyper()) == 4
    assert SGD.nbytes_per_element(SGDHyper(momentum=0.9)) == 8
    with pytest.raises(ValueError, match=r"'adam' is not known: use adamw, sgd, lion"):
        optimizer("adam")
    assert Scratch.of(GRAIN).nbytes == GRAIN * 12


def test_defaults_are_torchs() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    for made, record in ((torch.optim.AdamW([param]), AdamWHyper()), (torch.optim.SGD([param]), SGDHyper())):
        assert asdict(record) == {name: made.defaults[name] for name in asdict(record)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamWHyper(lr=-1e-3), r"lr is -0\.001; it must not be negative"),
        (lambda: AdamWHyper(lr=float("nan")), r"lr is nan"),
        (lambda: AdamWHyper(lr=torch.tensor(0.1)), r"lr is tensor.*a Tensor; a number is needed"),  # type: ignore[arg-type]
        (lambda: AdamWHyper(eps=-1.0), r"eps is -1\.0"),
        (lambda: AdamWHyper(betas=(0.9, 1.0)), r"betas\[1\] is 1\.0; it must be below 1"),
        (lambda: AdamWHyper(betas=(-0.1, 0.9)), r"betas\[0\] is -0\.1"),
        (lambda: AdamWHyper(betas=(0.9,)), r"betas has 1 values; 2 are needed"),  # type: ignore[arg-type]
        (lambda: AdamWHyper(weight_decay=-1.0), r"weight_decay is -1\.0"),
        (lambda: SGDHyper(lr=-1.0), r"lr is -1\.0"),
        (lambda: SGDHyper(momentum=-0.5), r"momentum is -0\.5"),
        (lambda: SGDHyper(weight_decay=-0.5), r"weight_decay is -0\.5"),
        (lambda: SGDHyper(dampening="a"), r"dampening is 'a'"),  # type: ignore[arg-type]
        (lambda: SGDHyper(nesterov=True), r"nesterov with momentum 0\.0 and dampening 0\.0"),
        (lambda: SGDHyper(nesterov=True, momentum=0.9, dampening=0.1), r"dampening 0\.1: it needs"),
        (lambda: LionHyper(betas=(0.9, 1.5)), r"betas\[1\] is 1\.5"),
        (lambda: LionHyper(betas=(0.9, 0.9, 0.9)), r"betas has 3 values"),  # type: ignore[arg-type]
        (lambda: LionHyper(lr=-1), r"lr is -1"),
        (lambda: Scratch.of(100), r"sub-chunks of 100 elements: use a positive multiple of 64"),
    ],
)
def test_what_has_no_meaning(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": 1}, r"adamw keeps 2 states .*\(exp_avg, exp_avg_sq\); 1 were given"),
        ({"step": 0}, r"step 0: steps count from 1"),
        ({"grad": torch.zeros(9)}, r"grad has shape \[9\] and strides \[1\]; flat and contiguous \[10\] is needed"),
        ({"grad": torch.zeros(10).double()}, r"grad is torch.float64; torch.bfloat16 or"),
        ({"master": torch.zeros(10).bfloat16()}, r"master is torch.bfloat16; torch.float32 is needed"),
        ({"out": torch.zeros(20)[::2]}, r"out has shape \[10\] and strides \[2\]"),
        ({"master": torch.zeros(2, 5)}, r"master has shape \[2, 5\]"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    master = change.get("master", torch.zeros(10))
    states = [torch.zeros(10)] * change.get("states", 2)
    grad, out = change.get("grad", torch.zeros(10)), change.get("out")
    with pytest.raises(ValueError, match=message):
        ADAMW.update(master, states, grad, AdamWHyper(), step=change.get("step", 1), scratch=Scratch.of(GRAIN), out=out)


def test_records_are_frozen_and_by_keyword() -> None:
    with pytest.raises(FrozenInstanceError):
        AdamWHyper().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        AdamWHyper(1e-3)  # type: ignore[misc]


def test_momentum_needs_its_state() -> None:
    with pytest.raises(ValueError, match=r"sgd keeps 1 states .*\(momentum_buffer\); 0 were given"):
        SGD.update(torch.zeros(1), [], torch.zeros(1), SGDHyper(momentum=0.9), step=1, scratch=Scratch.of(GRAIN))


def test_nothing_to_do() -> None:
    empty = torch.zeros(0)
    ADAMW.update(empty, [empty, empty], empty, AdamWHyper(), step=1, scratch=Scratch.of(GRAIN), out=empty)


@pytest.mark.parametrize("hyper", HYPERS, ids=repr)
def test_no_memory_is_allocated_for_elements(hyper: Any) -> None:
    flat, grad = Flat(torch.ones(1000), hyper), torch.ones(1000).bfloat16()
    out, clip = torch.empty(1000, dtype=torch.float16), Clip(coefficient=torch.tensor(0.5).bfloat16())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        flat.step(grad, hyper, 1, [slice(None)], out=out, clip=clip)
    events = profile.events()
    assert events is not None
    assert len(events) > 0
    assert max(event.cpu_memory_usage for event in events) <= 16  # a number that became a tensor


def test_a_sub_chunk_that_torch_shares_among_its_threads() -> None:
    count, generator = SUBCHUNK + 99, torch.Generator().manual_seed(6)
    hyper, grad = AdamWHyper(), values(count, generator).bfloat16()
    param = torch.nn.Parameter(values(count, generator))
    param.grad = grad.float()
    reference, flat = resident(hyper, param), Flat(param.data, hyper, SUBCHUNK)
    reference.step()
    flat.step(grad, hyper, 1, [slice(None)])
    assert flat.equals(param, reference)
