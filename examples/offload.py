"""Run a module that is already built in a fraction of its memory, with the same bits.

python examples/offload.py
"""

import torch
from torch import nn

import penstock


class Residual(nn.Module):
    """One of many like it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [..., width], in and out."""
        return x + self.down(torch.relu(self.up(x)))


def main() -> None:
    """Compare a module of 128 MiB with itself under a budget of 32 MiB."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Residual(512) for _ in range(16)))
    x = torch.randn(4, 512)
    with torch.no_grad():
        expected = module(x)
        penstock.offload(module, max_memory={"host": "32MiB"}, device="cpu")
        print(penstock.explain(module))
        for _ in range(3):
            result = module(x)
    print("same bits:", torch.equal(result, expected))
    penstock.close(module)


if __name__ == "__main__":
    main()
