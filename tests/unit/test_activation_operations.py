"""Operations of a forward, numbered, and the same forward without those whose results are held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penstock.runtime.activations.hold import HeldTensor, Hold, Shape
from penstock.runtime.activations.operations import OperationLog
from penstock.runtime.activations.replay import DivergedError, Replay, Rerun, rerun

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CHANCES = torch.rand(6, 8, generator=torch.Generator().manual_seed(2))
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def log(work: Callable[[], Tensor]) -> tuple[OperationLog, Tensor]:
    made = OperationLog(
        lambda tensor: tensor.untyped_storage()._cdata == W.untyped_storage()._cdata,
        given=[each.untyped_storage()._cdata for each in (X, CHANCES)],
    )
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


def bring(each: HeldTensor) -> Tensor:
    assert each.hold.storage is not None
    return each.shape.on(each.hold.storage)


def replay(
    made: OperationLog, work: Callable[[], Tensor], results: dict[int, tuple[HeldTensor, ...]]
) -> tuple[Replay, Tensor]:
    part = Rerun(operations=made.operations, held=results, left_out=frozenset(), views=frozenset(made.views))
    again = Replay(part, bring)
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
    assert [operation.kind for operation in made.operations] == ["product", "other", "other", "product"]
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
def test_what_is_never_held(work: Callable[[], Tensor]) -> None:
    made, _ = log(work)
    assert all(not operation.holds for operation in made.operations)


def block(x: Tensor) -> Tensor:
    """What attention and a gated layer have in common: a product and a sum, a norm of that, two products, a product of
    what they make, and one that backward does not look at."""
    attended = x + x @ W
    normed = attended / attended.norm()
    gate, up = normed @ W, normed @ W.t()
    return attended + (torch.sigmoid(gate) * up) @ W


def test_only_what_is_wanted_and_what_it_is_made_of_is_carried_out() -> None:
    """products 0, 4, 5, 8; sums 1, 9; the norm 2 and what is divided by it 3; 6 the sigmoid, 7 the product of both."""
    made, expected = log(lambda: block(X))
    assert [n for n, each in enumerate(made.operations) if each.kind == "product"] == [0, 4, 5, 8]
    assert not made.opaque
    middle = held(X + X @ W)
    part = rerun(made, {1: middle}, {6}, until=8)
    assert part.held == {1: middle}
    assert part.left_out == {0, 5, 7}
    again = Replay(part, bring)
    kept = []

    def until_the_sigmoid() -> Tensor:
        attended = X + X @ W
        normed = attended / attended.norm()
        gate, _ = normed @ W, normed @ W.t()
        kept.append(torch.sigmoid(gate))
        return attended @ W  # past the end, where nothing is known

    with pytest.raises(DivergedError), again:
        until_the_sigmoid()
    attended = X + X @ W
    assert torch.equal(kept[0], torch.sigmoid((attended / attended.norm()) @ W))
    assert again.skipped == 3  # 0, 1 and 5
    assert torch.equal(replay(made, lambda: block(X), {})[1], expected)


def test_a_difference_is_noticed_where_something_was_left_out() -> None:
    made, _ = log(lambda: block(X))
    part = rerun(made, {}, {3}, until=9)
    assert 4 in part.left_out

    def differs() -> Tensor:
        attended = X + X @ W
        normed = attended / attended.norm()
        return torch.tanh(normed @ W)

    with pytest.raises(DivergedError), Replay(part, bring):
        differs()


def test_numbers_that_python_looks_at_are_made_again() -> None:
    def branches() -> Tensor:
        total = (X * 2.0).sum()
        return X + 1.0 if total.item() > 0 else X - 1.0

    made, expected = log(branches)
    assert made.looked_at == {1}
    part = rerun(made, {}, set(), until=made.count)
    assert part.left_out == {2}
    with Replay(part, bring):
        assert branches().shape == expected.shape


def test_random_numbers_are_drawn_in_the_same_order_and_what_they_scale_is_not_looked_at() -> None:
    def drops() -> Tensor:
        return functional.dropout(X @ W, 0.5) + functional.dropout(X, 0.5)

    torch.manual_seed(5)
    made, _ = log(drops)
    part = rerun(made, {}, set(), until=made.count)
    assert 0 in part.left_out, "a mask depends on the shape of the product alone"
    torch.manual_seed(5)
    drops()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with Replay(part, bring):
        drops()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.from_numpy((X @ W).numpy() * 2) + 1.0,
        lambda: (lambda out: (out.numpy().fill(3.0), out + X)[1])(torch.empty_like(X)),
    ],
)
def test_what_a_library_has_made_of_tensors_is_noticed(work: Callable[[], Tensor]) -> None:
    """numpy stands for kernels that torch is not told of: what they were given may not be left out."""
    made, _ = log(work)
    assert made.opaque
    assert rerun(made, {}, set(), until=made.count).left_out == frozenset()


def test_results_that_are_changed_afterwards_are_known() -> None:
    def changes() -> Tensor:
        y = X @ W
        z = y + 1.0
        y.mul_(2.0)
        return z * y

    made, _ = log(changes)
    assert made.changed == {0}


def test_results_are_shown_as_they_are_made_and_changes_after_that_are_seen() -> None:
    seen: list[HeldTensor] = []

    def note(number: int, outputs: object) -> None:
        assert isinstance(outputs, list)
        hold = Hold(store=None, nbytes=1, number=number, forward=0, storage=outputs[0].untyped_storage())  # type: ignore[arg-type]
        seen.append(HeldTensor(hold, outputs[0]))

    made = OperationLog(lambda _: False, made=note)
    weight = W.clone().requires_grad_()
    with made:
        y = X @ weight
        z = y * 2.0
    assert [each.hold.number for each in seen] == [0, 1]
    assert not any(each.witness.changed for each in seen)
    with torch.no_grad():
        z.add_(1.0)
    assert [each.witness.changed for each in seen] == [False, True]


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
    assert [operation.kind for operation in made.operations] == ["other"]


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
