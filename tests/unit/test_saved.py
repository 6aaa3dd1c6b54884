"""What autograd saves of lent weights: references, fetched again when backward asks."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.memory.arena import PAGE, HostArena
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.saved import SavedTensors

BLOCK = 4


class Lending:
    """A session as far as saved tensors are concerned: one weight in one slot, which moves to the other."""

    def __init__(self) -> None:
        self.memory = HostArena(3 * PAGE)
        self.slots = [self.memory.cut(PAGE) for _ in range(3)]
        self.arena = torch.frombuffer(self.memory.buffer, dtype=torch.uint8)
        self.device = CpuDevice()
        self.executor = self
        self.at = self.slots[0]
        self.bindings = {BLOCK: SimpleNamespace(block=BLOCK, slot=self.at)}
        self.leases = self.acquired = 0

    def put(self, slot: Any, value: torch.Tensor) -> torch.Tensor:
        view = self.arena[slot.offset + 64 : slot.offset + 64 + value.nbytes].view(value.dtype).view(value.shape)
        view.copy_(value)
        return view

    def move(self, value: torch.Tensor) -> None:
        """The lease ends; the old slot is poisoned and the block comes back elsewhere."""
        self.bindings[BLOCK].slot = None
        self.memory.poison(self.at)
        self.at = self.slots[2]
        self.put(self.at, value)

    def acquire(self, block: int, *, backward: bool) -> Any:
        assert block == BLOCK
        assert backward  # it has an order of its own, if any
        self.leases += 1
        self.acquired += 1
        return SimpleNamespace(residence=SimpleNamespace(slot=self.at, event=None, permanent=False))

    def release(self, lease: Any, event: object) -> None:
        self.leases -= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_survive_a_refilled_slot(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    session = Lending()
    weight, x = torch.randn(5, 6).to(dtype), torch.randn(3, 6).to(dtype)
    plain = x.clone().requires_grad_()
    torch.nn.functional.linear(plain, weight).pow(2).sum().backward()
    streamed = x.clone().requires_grad_()
    with SavedTensors(session).hooks():  # type: ignore[arg-type]
        loss = torch.nn.functional.linear(streamed, session.put(session.at, weight)).pow(2).sum()
    session.move(weight)
    loss.backward()
    assert plain.grad is not None
    assert streamed.grad is not None
    assert torch.equal(streamed.grad, plain.grad)
    assert session.acquired > 0
    assert session.leases == 0


def test_strided_views_come_back_as_they_were() -> None:
    session = Lending()
    value = torch.randn(4, 6)
    saved = SavedTensors(session)  # type: ignore[arg-type]
    view = session.put(session.at, value)[1:, ::2].t()
    packed = saved._pack(view)
    assert not isinstance(packed, torch.Tensor)
    session.move(value)
    back = saved._unpack(packed)
    assert torch.equal(back, value[1:, ::2].t())
    session.memory.poison(session.at)
    assert torch.equal(back, value[1:, ::2].t())  # a copy: it outlives the lease


def test_other_tensors_are_left_alone() -> None:
    session = Lending()
    saved = SavedTensors(session)  # type: ignore[arg-type]
    own = torch.randn(3)
    assert saved._unpack(saved._pack(own)) is own
    sparse = torch.eye(3).to_sparse()
    assert saved._unpack(saved._pack(sparse)) is sparse
    stray = session.arena[session.slots[1].offset :][:8].view(torch.float32)  # leased without a binding
    back = saved._unpack(saved._pack(stray))
    assert torch.equal(back, stray)
    assert back.data_ptr() != stray.data_ptr()


class Token:
    """Something that a node of a graph can own."""


def test_a_graph_that_is_dropped_without_backward_frees_what_it_kept() -> None:
    session = Lending()
    x = torch.randn(64, requires_grad=True)
    with SavedTensors(session).hooks():  # type: ignore[arg-type]
        result = x.exp().exp()  # exp keeps its own result
    token = Token()
    result.grad_fn.metadata["token"] = token  # type: ignore[union-attr]
    seen = weakref.ref(token)
    del result, token
    assert seen() is None  # a cycle through C++, which no collector finds, would keep the node


def test_a_change_in_place_is_refused_in_backward_as_without_hooks() -> None:
    session = Lending()
    x = torch.randn(3, requires_grad=True)
    with SavedTensors(session).hooks():  # type: ignore[arg-type]
        result = x.exp()
    with torch.no_grad():
        result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
