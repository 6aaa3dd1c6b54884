"""What a model and its work take of memory: the records, and the arithmetic that needs no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from ..memory.errors import UsageError

Kind = Literal["weights", "gradients", "optimizer", "activations", "kv", "workspace"]
Training = Literal["adamw", "lora"]

DEFAULT_CONTEXT: Final = 0
"""Stands for a context that nobody has named."""
STATE_ITEMSIZE: Final = 4
"""Bytes of an element of the optimizer's m, v and master weights, whatever the weights are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Bytes by what they are for."""

    weights: int = 0
    """Parameters and buffers."""
    gradients: int = 0
    optimizer: int = 0
    """AdamW's m and v in fp32, and a master copy in fp32 where the weights are narrower."""
    activations: int = 0
    """What is kept from forward to backward."""
    kv: int = 0
    """Keys and values, or the states that stand for them."""
    workspace: int = 0
    """All that lives shorter: the intermediate results of a layer, logits, masks."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in dataclasses.fields(self))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(**{name: getattr(self, name) + getattr(other, name) for name in KINDS})


KINDS: Final[tuple[Kind, ...]] = ("weights", "gradients", "optimizer", "activations", "kv", "workspace")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a model is to do."""

    train: Training | None = None
    """None is inference: a prompt, then one token after another until the context is full."""
    batch: int = 1
    """Sequences, or images."""
    context: int = 0
    """Tokens per sequence; on both sides of an encoder–decoder. `DEFAULT_CONTEXT` is 512, or as many as the model has
    positions for."""
    packed: bool = False
    """Whether sequences in training hold several documents, which positions keep apart: attention is masked then."""
    rank: int = 16
    """Of the adapters of LoRA."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the linear layers that get them; all but the output layer where none is named."""
    dropout: float = 0.0
    """Of what goes into them."""

    def __post_init__(self) -> None:
        for name in ("batch", "rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} has no meaning: give 1 or more")
        if self.context < 2 and self.context != DEFAULT_CONTEXT:
            raise UsageError(f"--context {self.context} leaves no room for a prompt and a token: give 2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSize:
    """One module, or all layers of a stack together."""

    path: str
    """With * for the numbers of the layers of a stack."""
    count: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What it leaves behind for backward."""
    kv: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.kv


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a model takes under a workload. Bytes of tensors: the interpreter and its libraries come on top."""

    model: str
    """As it was asked for."""
    architecture: str
    """Class name."""
    parameters: int
    """Elements, tied ones once; adapters not among them."""
    trainable: int
    """Elements that training changes."""
    dtype: str
    """Of the weights: bfloat16, float32, …"""
    workload: Workload
    most: Bytes
    """The most of each kind that is held at any time. These times differ: the sum is never held at once."""
    peak: Bytes
    """What is held at the instant at which most is held in all."""
    checkpointed: Bytes | None
    """`peak` with activation checkpointing; None for inference, and where the model cannot do it."""
    block_nbytes: int
    """The largest block that would have to be streamed whole."""
    modules: tuple[ModuleSize, ...]
    """Largest first."""
    notes: tuple[str, ...] = ()
    """What is not counted, or only estimated."""


def optimizer_nbytes(elements: int, itemsize: int) -> int:
    """What AdamW keeps of `elements` weights of `itemsize` bytes each."""
    states = 2 + (itemsize < STATE_ITEMSIZE)
    return states * STATE_ITEMSIZE * elements


def step_nbytes(elements: int, itemsize: int) -> int:
    """What the optimizer needs besides while it changes a tensor of `elements`: two intermediate results, and the
    gradient in fp32 where it is narrower."""
    copies = 2 + (itemsize < STATE_ITEMSIZE)
    return copies * STATE_ITEMSIZE * elements


def training_peak(*, weights: int, optimizer: int, gradients: int, sweep: Bytes, step: int) -> Bytes:
    """The peak of a training step: in forward and backward, or while the optimizer works. `sweep` is the peak of what
    forward and backward take besides weights and optimizer states."""
    held = Bytes(weights=weights, optimizer=optimizer)
    stepping = Bytes(gradients=gradients, workspace=step)
    return held + (sweep if sweep.total >= stepping.total else stepping)


def extrapolate(lengths: Sequence[int], sizes: Sequence[int], length: int) -> int:
    """The value at `length` of the polynomial through (lengths, sizes): what is constant, proportional to the length or
    to its square is met exactly."""
    total = Fraction(0)
    for i, (at, size) in enumerate(zip(lengths, sizes, strict=True)):
        term = Fraction(size)
        for j, other in enumerate(lengths):
            if i != j:
                term *= Fraction(length - other, at - other)
        total += term
    return max(0, round(total))


def extrapolate_bytes(lengths: Sequence[int], found: Sequence[Bytes], length: int) -> Bytes:
    """`extrapolate`, of each kind."""
    return Bytes(**{kind: extrapolate(lengths, [getattr(each, kind) for each in found], length) for kind in KINDS})
