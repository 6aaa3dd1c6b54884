"""Profile a streamed model, with a fault that the profile shows: --shuffle.

python examples/profile_a_streamed_model.py shuffled.prof --shuffle
python examples/profile_a_streamed_model.py fixed.prof
penstock prof diff shuffled.prof fixed.prof --by module

Builds a random model of 288 MiB (nothing is fetched), gives it half of that, and runs it 30 times. docs/profiling.md
follows the fault from the verdict to the line that is wrong.
"""

import argparse
import random

import torch
from torch import nn

import penstock

WIDTH = 768
LAYERS = 16
BUDGET = "144MiB"
TOKENS = 48
STEPS = 30


class Layer(nn.Module):
    """One of many like it: 18 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [tokens, WIDTH], in and out."""
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A stack of layers, trained with two of them swapped at random so that each learns to work anywhere."""

    def __init__(self, *, always_shuffle: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.always_shuffle = always_shuffle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [tokens, WIDTH], in and out."""
        layers = list(self.layers)
        if self.training or self.always_shuffle:  # the fault: swapping is for training only
            first, second = random.sample(range(LAYERS), 2)
            layers[first], layers[second] = layers[second], layers[first]
        for layer in layers:
            x = layer(x)
        return x


def main() -> None:
    """Stream the model, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="the file to write")
    parser.add_argument("--shuffle", action="store_true", help="leave the swapping of layers on: the fault")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steadier times where other programs run, as they do on the machines of builds
    model = penstock.offload(Model(always_shuffle=arguments.shuffle).eval(), max_memory={"host": BUDGET}, device="cpu")
    x = torch.randn(TOKENS, WIDTH)
    try:
        with penstock.Profiler(arguments.profile) as profiler, torch.no_grad():
            for _ in range(arguments.steps):
                model(x)
    finally:
        penstock.close(model)
    print(profiler.summary().verdict)


if __name__ == "__main__":
    main()
