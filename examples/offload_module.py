"""Run a module that is built already under a quarter of its memory, with the same result to the last bit."""

import torch
from torch import nn

import penstock


def main() -> None:
    """Build a stack of layers, run it, offload it, run it again."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(32))).eval()
    x = torch.randn(4, 1024)
    with torch.no_grad():
        expected = module(x)

    weights_nbytes = sum(parameter.nbytes for parameter in module.parameters())
    penstock.offload(module, max_memory={"host": weights_nbytes // 4}, device="cpu")
    try:
        print(penstock.explain(module))
        with torch.no_grad():
            print("equal:", torch.equal(expected, module(x)))
    finally:
        penstock.close(module)


if __name__ == "__main__":
    main()
