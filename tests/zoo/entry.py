"""One small model of the zoo, and how to put it to work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]

NOISE = 0.15
"""Added to every parameter of a fresh model. Without it norms are ones and biases zeros, and a test could not tell one
layer's norm from another's; and with less of it the greedy token hardly depends on the position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A small random model: how to build it, what to feed it, and what must come out bit-equal."""

    name: str
    make: Callable[[], nn.Module]
    """The constructor; `build` seeds it."""
    inputs: Callable[[], dict[str, Tensor]]
    """Fresh inputs, the same each time."""
    forward: Callable[[nn.Module, Inputs], Outputs]
    """One sweep over the whole model."""
    generate: Callable[[nn.Module, Inputs], Outputs] | None = None
    """Several sweeps, as a decoder makes them; None for models that do not generate."""
    dtype: torch.dtype = torch.float32
    fixed_order: bool = True
    """Whether every forward uses each layer once and in the same order, so that bytes read per sweep are known."""
    pretrained: bool = True
    """Whether it is a transformers model, which `save` can write and `load` can read."""
    variants: Callable[[], tuple[Inputs, ...]] | None = None
    """More inputs, which take other ways through the model; None where there are none."""

    def build(self) -> nn.Module:
        """The model, resident, in eval mode, with weights that are the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=NOISE)
        return model.to(self.dtype).eval()

    def run(self, model: nn.Module) -> Outputs:
        """Everything that has to be bit-equal: one sweep, the variants, and generation."""
        with torch.no_grad():
            inputs = self.inputs()
            outputs = self.forward(model, inputs)
            for i, variant in enumerate(self.variants() if self.variants else ()):
                outputs |= {f"variant {i} {key}": value for key, value in self.forward(model, variant).items()}
            if self.generate is not None:
                outputs |= {f"generate {key}": value for key, value in self.generate(model, inputs).items()}
        return outputs

    def sweep(self, model: nn.Module) -> Outputs:
        """One forward, without gradients."""
        with torch.no_grad():
            return self.forward(model, self.inputs())

    def save(self, folder: Path, *, max_shard_size: str = "400KB") -> Path:
        """Write the model as a checkpoint of several shards and return its folder."""
        assert self.pretrained, self.name
        model: Any = self.build()
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder


def load_resident(folder: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """What a checkpoint should behave like: transformers' own load of it, whole and in memory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=dtype)
    # As `penstock.load` gives it. This is no matter of taste: torch picks another kernel, with other roundings, for a
    # strided input where the weight requires a gradient.
    return model.eval()


def differences(expected: Outputs, actual: Outputs) -> list[str]:
    """The names of the outputs that are not bit-equal, each with how far apart they are; empty when all is well."""
    found = []
    for key in sorted(expected.keys() | actual.keys()):
        a, b = expected.get(key), actual.get(key)
        if a is None or b is None:
            found.append(f"{key}: missing on one side")
        elif a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{key}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
        elif not torch.equal(a, b):
            far = (a.double() - b.double()).abs().max().item()
            found.append(f"{key}: differs by up to {far:g} in {int((a != b).sum())} of {a.numel()} elements")
    return found
