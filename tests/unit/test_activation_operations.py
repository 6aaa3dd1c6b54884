"""Operations of a forward, numbered, and the same forward without those whose results are held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penstock.runtime.activations.hold import HeldTensor, Hold, Shape
from penstock.runtime.activations.operations import OperationLog, Replay

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CHANCES = torch.rand(6, 8, generator=torch.Generator().manual_seed(2))
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def log(work: Callable[[], Tensor]) -> tuple[OperationLog, Tensor]:
    made = OperationLog(lambda tensor: tensor.untyped_storage()._cdata == W.untyped_storage()._cdata)
    with made:
        result = work()
    return made, result


def held(*tensors: Tensor) -> tuple[HeldTensor, ...]:
    """Tensors of other values than those that were made, to see where they come from."""
    found = []
    for number, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        hold = Hold(store=None, nbytes=storage.nbytes(), number=number, forward=0, storage=storage)  # type: ignore[arg-type]
        found.append(HeldTensor(hold, tensor))
    return tuple(found)


def replay(
    made: OperationLog, work: Callable[[], Tensor], results: dict[int, tuple[HeldTensor, ...]]
) -> tuple[Replay, Tensor]:
    again = Replay(made.operations, results, lambda each: each.shape.on(each.hold.storage))  # type: ignore[arg-type]
    with again:
        result = work()
    return again, result


def chain() -> Tensor:
    """Products 0 and 3, with a sum, a change in place and a view between, which has no number."""
    y = X @ W
    z = y.t() + 1.0
    z.mul_(1.0)
    return z.t() @ W


def test_operations_are_numbered_and_counted() -> None:
    made, _ = log(chain)
    assert [operation.product for operation in made.operations] == [True, False, False, True]
    assert made.operations[0].flops == made.operations[3].flops == 2 * 6 * 8 * 8
    assert made.operations[1].flops == 48
    assert made.operations[2].signature[1][0][0] == 1  # what the sum has made
    assert made.operations[3].signature[1][0][0] == 2  # and the change in place has changed
    assert not made.operations[2].outputs
    assert made.operations[1].outputs[0].stride == (X @ W).t().add(1.0).stride()


def test_what_is_held_takes_the_place_of_what_would_be_made() -> None:
    made, expected = log(chain)
    assert torch.equal(replay(made, chain, {})[1], expected)
    again, result = replay(made, chain, {0: held(X @ W)})
    assert again.skipped == 1
    assert torch.equal(result, expected)
    other = torch.ones(6, 8)
    _, result = replay(made, chain, {0: held(other)})
    assert torch.equal(result, (other.t() + 1.0).t() @ W)


def test_after_a_difference_nothing_is_skipped() -> None:
    made, _ = log(chain)

    def differs() -> Tensor:
        y = torch.sin(X) @ W  # another argument than the first time, of the same shape
        z = y.t() + 1.0
        return z.t() @ W

    again, result = replay(made, differs, {1: held(torch.ones(8, 6)), 2: held(torch.ones(6, 8))})
    assert again.skipped == 0
    assert torch.equal(result, differs())


def test_what_was_made_by_other_operations_is_not_taken_for_the_same() -> None:
    """Two products of the same shapes: only where their arguments come from tells them apart."""

    def first() -> Tensor:
        a, b = torch.sin(X), torch.cos(X)
        return (a @ W) + (b @ W)

    def swapped() -> Tensor:
        a, b = torch.sin(X), torch.cos(X)
        return (b @ W) + (a @ W)

    made, _ = log(first)
    again, result = replay(made, swapped, {2: held(torch.ones(6, 8))})
    assert again.skipped == 0
    assert torch.equal(result, swapped())


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.bernoulli(CHANCES),  # those that are drawn after it would be others
        lambda: W + W,  # autocast may have made it before
        lambda: X.mul_(1.0),
        lambda: X.t(),
        lambda: torch.zeros(4),
    ],
)
def test_what_is_never_skipped(work: Callable[[], Tensor]) -> None:
    made, _ = log(work)
    assert all(not operation.outputs for operation in made.operations)


def test_attention_is_skipped_with_all_its_results() -> None:
    q, k, v = (torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def attend() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True) * 1.0

    made, expected = log(attend)
    number = next(n for n, each in enumerate(made.operations) if len(each.outputs) == 2)
    assert made.operations[number].flops == 4 * q.numel() * 5
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    again, result = replay(made, attend, {number: held(out, sums)})
    assert again.skipped == 1
    assert torch.equal(result, expected)


def test_what_is_paused_is_not_seen() -> None:
    made = OperationLog(lambda _: False)
    with made:
        made.paused = True
        _ = X @ W
        made.paused = False
        _ = X + W[:6]
    assert [operation.product for operation in made.operations] == [False]


def test_a_storage_made_by_no_operation_has_no_maker_where_another_one_lay() -> None:
    """`torch.tensor` and `from_numpy` make storages that no mode is told of, and malloc hands addresses out again."""
    seen, again = 0, set[int]()

    def work() -> Tensor:
        nonlocal seen
        for _ in range(64):
            temporary = X * 2.0
            again.add(temporary.untyped_storage()._cdata)
            del temporary
            scalar = torch.tensor(0.5)
            seen += scalar.untyped_storage()._cdata in again
            assert made.maker(scalar)[0] == -1
        return X @ W

    made = OperationLog(lambda tensor: False)
    with made:
        work()
    assert seen, "no address came again: the test shows nothing"


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view, lambda x: x.conj().imag, lambda x: x.t()])
def test_lazy_conjugates_and_negatives_come_back(view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    wanted = view(x)
    found = Shape.of(wanted).on(wanted.untyped_storage())
    assert torch.equal(found, wanted)
    assert (found.is_conj(), found.is_neg()) == (wanted.is_conj(), wanted.is_neg())
