"""Views of lent weights last as long as the call that took them, in the thread that took them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import penstock


class Views(nn.Module):
    """Takes a view of a weight that no forward leases, or lets `elsewhere` do it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.elsewhere = False
        self.kept: list[int] = []
        self.views: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        weight = self.layers[0].weight
        session = self.penstock.machinery.session  # type: ignore[union-attr]

        def touch() -> None:
            with torch.no_grad():
                self.views.append(session.stray.call([weight], torch.Tensor.t, (weight,), {}))

        if self.elsewhere:
            thread = threading.Thread(target=touch)
            thread.start()
            thread.join()
        else:
            touch()
        self.kept.append(sum(len(frame.leases) for frame in session._frames()))
        return x + self.views[-1].sum()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_call_keeps_the_views_of_its_own_thread_only(elsewhere: bool) -> None:
    torch.manual_seed(0)
    module = Views()
    expected = module.layers[0].weight.detach().t().clone()
    penstock.offload(module, max_memory={"host": "1800KiB"}, device="cpu")
    try:
        module.elsewhere = elsewhere
        with torch.no_grad():
            for _ in range(3):
                module(torch.ones(1, 256))
                if elsewhere:  # a copy, which the other thread may hold as long as it likes
                    assert torch.equal(module.views[-1], expected)
        assert all(bool(kept) is not elsewhere for kept in module.kept)
    finally:
        penstock.close(module)
