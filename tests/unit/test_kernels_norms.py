"""The norm of all gradients: the bits of torch's `clip_grad_norm_`, from norms that came one at a time."""

import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.norms import GradientNorms, clip_coefficient, gradient_norm, total_norm

pytestmark = pytest.mark.usefixtures("every_core")

SHAPES: list[tuple[int, ...]] = [
    (1,), (), (7,), (16,), (33, 3), (64, 65), (4, 3, 3, 3), (100,), (257,), (300, 300), (32768,), (512, 1031), (2, 0),
]  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def gradients(dtypes: list[torch.dtype], scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chosen = [dtypes[i % len(dtypes)] for i in range(len(SHAPES))]
    return [(torch.randn(s, generator=generator) * scale).to(d) for s, d in zip(SHAPES, chosen, strict=True)]


def with_gradients(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    made = []
    for grad in grads:
        param = torch.nn.Parameter(torch.zeros_like(grad))
        param.grad = grad.clone()
        made.append(param)
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1).double(), b.view(-1).double())


MIXES = [
    [torch.float32],
    [torch.bfloat16],
    [torch.float16],
    [torch.bfloat16, torch.float32],
    [torch.float32, torch.bfloat16],
    [torch.float16, torch.float32, torch.bfloat16],
]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0])
def test_as_torch_clips(dtypes: list[torch.dtype], foreach: bool | None, max_norm: float, scale: float) -> None:
    grads = gradients(dtypes, scale)
    params = with_gradients(grads)
    wanted = torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)
    norms = GradientNorms(len(grads))
    order = list(range(len(grads)))
    random.Random(0).shuffle(order)
    for index in order:
        norms.add(index, grads[index].flatten())  # how a gradient is kept: flat
    total = norms.total()
    assert same(total, wanted)
    coefficient = clip_coefficient(total, max_norm)
    for grad, param in zip(grads, params, strict=True):
        assert param.grad is not None
        assert same(grad.clone().mul_(coefficient), param.grad)


@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-3, 1),
)
def test_of_any_lengths(counts: list[int], dtype: torch.dtype, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = [(torch.randn(count, generator=generator) * 10.0**exponent).to(dtype) for count in counts]
    wanted = torch.nn.utils.get_total_norm(grads)
    assert same(total_norm([gradient_norm(grad) for grad in grads]), wanted)


def test_halves_are_summed_in_fp32() -> None:
    # 4096 ones: a bf16 sum would stop at 256, and its root be 16
    for dtype in HALVES:
        norm = gradient_norm(torch.ones(4096, dtype=dtype))
        assert (norm.dtype, norm.item()) == (dtype, 64.0)


def test_an_unaligned_address_does_not_matter() -> None:
    for dtype in DTYPES:
        store = torch.randn(5001, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert same(gradient_norm(store[1:]), gradient_norm(store[1:].clone()))


def test_in_another_thread() -> None:
    grads, found = gradients([torch.bfloat16]), []
    thread = threading.Thread(target=lambda: found.append(total_norm([gradient_norm(g) for g in grads])))
    thread.start()
    thread.join()
    assert same(found[0], torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite(bad: float) -> None:
    grads = [torch.ones(3), torch.tensor([1.0, bad])]
    norms = [gradient_norm(grad) for grad in grads]
    wanted = torch.nn.utils.get_total_norm(grads)
    total = total_norm(norms)
    assert str(total) == str(wanted)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.utils.clip_grad_norm_(with_gradients(grads), 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as ours:
        total_norm(norms, error_if_nonfinite=True)
    assert str(ours.value) == str(theirs.value)
    params = with_gradients(grads)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for grad, param in zip(grads, params, strict=True):
        assert str(grad * clip_coefficient(total, 1.0)) == str(param.grad)


def test_none_at_all() -> None:
    assert same(GradientNorms(3).total(), torch.nn.utils.get_total_norm([]))


def test_those_without_a_gradient_are_left_out() -> None:
    grads = gradients([torch.float32])
    norms = GradientNorms(len(grads) + 2)
    for index, grad in enumerate(grads):
        norms.add(index + (index > 4), grad)
    assert same(norms.total(), torch.nn.utils.get_total_norm(grads))


def test_what_does_not_fit() -> None:
    norms = GradientNorms(2)
    norms.add(0, torch.ones(1))
    with pytest.raises(ValueError, match="the gradient of parameter 0 came twice in one step: add it up first"):
        norms.add(0, torch.ones(1))
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"parameter {index} of 2: there is none"):
            norms.add(index, torch.ones(1))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="a norm is 0 or more"):
            clip_coefficient(torch.tensor(1.0), bad)
