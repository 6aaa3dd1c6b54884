"""Models that are nothing but torch, each with one habit that is hard to stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .entry import Entry, Inputs, Outputs

WIDTH = 128
"""A square linear of this width is 64 KiB in fp32."""


def _noise(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Skips(nn.Module):
    """A U-Net: what goes down comes up again, through skips, past layers that lie between."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(self._stage(a, b) for a, b in zip(widths, (*widths[1:], 96), strict=True))
        self.middle = self._stage(96, 96)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths[::-1], (96, 64, 32), strict=True)
        )
        self.merge = nn.ModuleList(self._stage(2 * a, a) for a in widths[::-1])
        self.head = nn.Conv2d(widths[0], 3, 1)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for stage in self.down:
            skips.append(x)
            x = functional.max_pool2d(stage(x), 2)
        x = self.middle(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((up(x), skips.pop()), dim=1))
        out: Tensor = self.head(x)
        return out


class Wanderer(nn.Module):
    """Takes its layers forwards or backwards and skips some, as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.extra = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = float(x[0, 0])
        layers = list(self.layers)
        if first < 0:
            layers.reverse()
        for i, layer in enumerate(layers):
            if abs(first) > 1 and i % 3 == 1:
                continue
            x = x + torch.tanh(layer(x))
        return self.extra(x) if abs(first) < 2 else x


class Echo(nn.Module):
    """Uses one layer twice in a sweep, with others in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 2, 1, 3, 4, 5, 5, 0):
            x = x + torch.tanh(self.layers[i](x))
        return x


class Siblings(nn.Module):
    """Layers that share parameters: one weight in three layers, one bias in all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))
        for layer in self.layers:
            layer.bias = self.layers[0].bias
        self.layers[3].weight = self.layers[6].weight = self.layers[1].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class FastPath(nn.Module):
    """torch's own encoder. In eval mode it hands raw weights, those of its children too, to one fused function."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=192, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(64, 4, kdim=96, vdim=96, batch_first=True)
        self.other = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        memory = self.other(x)
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        out: Tensor = self.norm(x)
        return out


class Hoarder(nn.Module):
    """Keeps its weights in lists and in itself, and uses them without calling any module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(6))
        self.biases = nn.ParameterDict({f"b{i}": torch.randn(WIDTH) for i in range(6)})
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.table = nn.Parameter(torch.randn(512, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for i, weight in enumerate(self.weights):
            x = x + torch.tanh(x @ weight + self.biases[f"b{i}"])
        return functional.linear(x * self.scale, self.table)


class Borrower(nn.Module):
    """Reads its children's weights without calling the children, and calls one of them in another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.embedding = nn.Embedding(512, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(functional.linear(x, layer.weight, layer.bias))
        return x @ self.embedding.weight.t()


def _single(model: nn.Module, inputs: Inputs) -> Outputs:
    return {"out": model(inputs["x"])}


def _ways() -> tuple[Inputs, ...]:
    """Inputs that send the wanderer forwards, backwards, past some layers, past the extra one, and forwards again."""
    ways = []
    for first in (-0.5, 1.5, -2.5, 0.5):
        x = _noise(4, WIDTH)
        x[0, 0] = first
        ways.append({"x": x})
    return tuple(ways)


PLAIN = (
    Entry(name="u-net", make=Skips, inputs=lambda: {"x": _noise(2, 3, 16, 16)}, forward=_single, pretrained=False),
    Entry(
        name="wanderer",
        make=Wanderer,
        inputs=lambda: {"x": _noise(4, WIDTH)},
        forward=_single,
        variants=_ways,
        pretrained=False,
        fixed_order=False,
    ),
    Entry(
        name="echo",
        make=Echo,
        inputs=lambda: {"x": _noise(4, WIDTH)},
        forward=_single,
        pretrained=False,
        fixed_order=False,
    ),
    Entry(
        name="siblings",
        make=Siblings,
        inputs=lambda: {"x": _noise(4, WIDTH)},
        forward=_single,
        pretrained=False,
        fixed_order=False,
    ),
    Entry(name="fast-path", make=FastPath, inputs=lambda: {"x": _noise(2, 12, 64)}, forward=_single, pretrained=False),
    Entry(name="hoarder", make=Hoarder, inputs=lambda: {"x": _noise(4, WIDTH)}, forward=_single, pretrained=False),
    Entry(
        name="borrower",
        make=Borrower,
        inputs=lambda: {"x": torch.randint(512, (2, 8), generator=torch.Generator().manual_seed(7))},
        forward=_single,
        pretrained=False,
        fixed_order=False,
    ),
)
