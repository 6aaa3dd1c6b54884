"""Buffers of a module as they were before its first forward, while the second one runs, and as they are afterwards."""

import torch
from torch import nn

from penstock.runtime.changedbuffers import ChangedBuffers


class Counting(nn.Module):
    """One buffer changes in every forward, one in every third, one never; one is another tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        for name in ("calls", "thirds", "fixed", "anew"):
            self.register_buffer(name, torch.zeros(2))
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.number += 1
        self.calls += 1
        if self.number % 3 == 0:
            self.thirds += 1
        self.anew = self.anew + 2
        return self.norm(x) + self.calls[0] + self.thirds[0] + self.anew[0]


def test_a_second_forward_begins_as_the_first_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    module, x = Counting(), torch.randn(4, 3)
    buffers = ChangedBuffers(module)
    for _ in range(4):
        number, before = module.number, buffers.before()
        first = module(x)
        changed = buffers.changed(before)
        assert ("thirds" in changed) is (module.number % 3 == 0)
        assert (
            {"calls", "anew", "norm.running_mean", "norm.num_batches_tracked"}
            <= set(changed)
            <= set(before) - {"fixed"}
        )
        now = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
        again, module.number = module.number, number
        with buffers.as_before(changed):
            assert torch.equal(module(x), first)
        assert module.number == again
        for name, buffer in module.named_buffers():
            assert buffer is now[name][0], name
            assert torch.equal(buffer, now[name][1]), name
