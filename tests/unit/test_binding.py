"""Parameters between and during leases."""

import pytest
import torch
from torch import nn

from penstock.memory.arena import PAGE, HostArena, Slot
from penstock.memory.errors import ReadOnlyWeightError
from penstock.memory.image import Place
from penstock.runtime.binding import Binding, Bound, contiguous_stride, placeholder, view_of

CPU = torch.device("cpu")


class Lent:
    """An arena with two slots, and a weight and a bias bound to block 3."""

    def __init__(self) -> None:
        self.arena = HostArena(2 * PAGE)
        self.flat = torch.frombuffer(self.arena.buffer, dtype=torch.uint8)
        self.slots = [self.arena.cut(PAGE), self.arena.cut(PAGE)]
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.bias = nn.Parameter(torch.zeros(3))
        places = [Place(offset=64, shape=(2, 3), dtype="F32"), Place(offset=128, shape=(3,), dtype="F32")]
        self.binding = Binding(
            block=3,
            tensors=[
                Bound(name=name, parameter=p, place=place, stride=tuple(p.stride()), empty=placeholder(p, CPU))
                for name, p, place in zip(("w", "b"), (self.weight, self.bias), places, strict=True)
            ],
        )
        for number, slot in enumerate(self.slots):
            self.put(slot, 10.0 * number)

    def put(self, slot: Slot, first: float) -> None:
        values = self.flat[slot.offset + 64 : slot.offset + 88].view(torch.float32)
        values.copy_(torch.arange(6) + first)


@pytest.fixture
def lent() -> Lent:
    return Lent()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.int8, torch.bool]
)
def test_placeholders_are_true_in_everything_but_value(dtype: torch.dtype) -> None:
    like = torch.zeros(300, 500).to(dtype)
    made = placeholder(like, CPU)
    assert (made.shape, made.dtype, made.device) == (like.shape, dtype, CPU)
    assert made.untyped_storage().nbytes() == dtype.itemsize
    if dtype.is_floating_point or dtype.is_complex:
        assert made.isnan().all()
    else:
        assert made[0, 0] == (True if dtype == torch.bool else torch.iinfo(dtype).max)


def test_a_lease_lends_views_and_takes_them_back(lent: Lent) -> None:
    before = id(lent.weight)
    lent.binding.bind(lent.flat, lent.slots[1])
    assert torch.equal(lent.weight.data, torch.arange(6.0).view(2, 3) + 10)
    assert lent.weight.data_ptr() == lent.arena.address + PAGE + 64
    assert lent.binding.slot is lent.slots[1]
    lent.binding.unbind()
    assert lent.weight.isnan().all()
    assert lent.weight.shape == (2, 3)
    assert id(lent.weight) == before
    assert lent.binding.slot is None


def test_views_are_made_once_per_slot(lent: Lent) -> None:
    first = lent.binding.views(lent.flat, lent.slots[0])
    assert lent.binding.views(lent.flat, lent.slots[0]) is first
    assert lent.binding.views(lent.flat, lent.slots[1]) is not first


def test_nested_leases_end_with_the_last(lent: Lent) -> None:
    lent.binding.bind(lent.flat, lent.slots[0])
    lent.binding.bind(lent.flat, lent.slots[0])
    lent.binding.unbind()
    assert not lent.weight.isnan().any()
    lent.binding.unbind()
    assert lent.weight.isnan().all()


def test_a_change_under_a_lease_for_reading_is_refused_and_undone(lent: Lent) -> None:
    lent.binding.bind(lent.flat, lent.slots[0])
    with torch.no_grad():
        lent.weight.add_(1)
    with pytest.raises(ReadOnlyWeightError, match="parameter w was changed in place"):
        lent.binding.unbind()
    assert lent.weight.isnan().all()
    assert lent.bias.isnan().all()  # the others were taken back all the same
    lent.binding.bind(lent.flat, lent.slots[0])
    lent.binding.unbind()  # and the next lease is a new one


def test_ties_stay_ties(lent: Lent) -> None:
    module = nn.Linear(3, 2, bias=False)
    module.weight = lent.weight
    lent.binding.bind(lent.flat, lent.slots[0])
    assert module.weight is lent.weight
    assert torch.equal(module(torch.ones(3)), torch.tensor([3.0, 12.0]))
    lent.binding.unbind()


def test_restore_leaves_placeholders(lent: Lent) -> None:
    lent.binding.bind(lent.flat, lent.slots[0])
    lent.binding.restore()
    assert lent.weight.isnan().all()
    assert lent.binding.uses == 0


def test_strides_are_kept() -> None:
    arena = torch.arange(64, dtype=torch.uint8)
    place = Place(offset=8, shape=(2, 3), dtype="U8")
    assert torch.equal(
        view_of(arena, 16, place, torch.uint8, (3, 1)), torch.arange(24, 30, dtype=torch.uint8).view(2, 3)
    )
    assert torch.equal(
        view_of(arena, 16, place, torch.uint8, (1, 2)), torch.arange(24, 30, dtype=torch.uint8).view(3, 2).T
    )
    empty = view_of(arena, 16, Place(offset=8, shape=(0, 3), dtype="F32"), torch.float32, (3, 1))
    assert (empty.shape, empty.dtype) == ((0, 3), torch.float32)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (5, 1, 2)])
def test_row_major_strides(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.zeros(shape).stride()
