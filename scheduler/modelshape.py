"""What a transformer is, as figures: its matrices with their sizes, its cache, and the operations of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from .hardware import Dtype
from .operations import Operation

Role = Literal["attention", "ffn", "expert", "router"]

ITEMSIZE: dict[Dtype, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One linear layer, or several alike of which each token uses some."""

    name: str
    role: Role
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    """How many there are: experts."""
    used: int = 1
    """By how many of them each token is multiplied."""

    @property
    def parameters(self) -> int:
        """Of all copies."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    def touched(self, tokens: float) -> float:
        """How many of the copies so many tokens need, if each chooses at random."""
        if self.copies <= self.used:
            return self.copies
        return self.copies * (1 - math.pow(1 - self.used / self.copies, tokens))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Decoder layers that are alike."""

    count: int
    matrices: tuple[Matrix, ...]
    vectors: int
    """Parameters that are in no matrix: norms, and biases of grouped experts."""

    @cached_property
    def parameters(self) -> int:
        """Of one of these layers."""
        return self.vectors + sum(matrix.parameters for matrix in self.matrices)

    def share(self, role: Role) -> float:
        """What of the parameters is in matrices of a role."""
        return sum(matrix.parameters for matrix in self.matrices if matrix.role == role) / self.parameters


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One decoder."""

    name: str
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
    kv_heads: int
    kv_elements: int
    """Elements of keys and values that one token leaves in the cache of one layer."""
    vocab: int
    tied: bool
    """The output projection is the input embedding."""
    ffn: int
    """Width of the widest feed-forward that one token goes through at once."""
    outside: int = 0
    """Parameters outside the layers, besides input embedding and output projection."""
    dtype: Dtype = "float16"
    family: str = ""
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(layer.count for layer in self.layers)

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        return ITEMSIZE[self.dtype]

    @property
    def layer_parameters(self) -> int:
        """Of all layers together."""
        return sum(layer.count * layer.parameters for layer in self.layers)

    @property
    def table_parameters(self) -> int:
        """Of input embedding and output projection, counted once where they are one."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layer_parameters + self.table_parameters + self.outside

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return self.parameters * self.itemsize

    @property
    def layer_nbytes(self) -> float:
        """Of the weights of one layer, on average."""
        return self.layer_parameters * self.itemsize / self.depth

    @property
    def head_nbytes(self) -> int:
        """Of the output projection."""
        return self.vocab * self.hidden * self.itemsize

    @property
    def used_parameters(self) -> float:
        """By which one token is multiplied: of experts, those that it uses."""
        layers = sum(
            layer.count * sum(matrix.inputs * matrix.outputs * matrix.used for matrix in layer.matrices)
            for layer in self.layers
        )
        return float(layers + self.vocab * self.hidden)

    @property
    def kv_nbytes(self) -> float:
        """Of the cache of one token in one layer, in the model's dtype (2 bytes where that is narrower)."""
        return self.kv_elements * max(self.itemsize, 2)

    @property
    def has_experts(self) -> bool:
        """Some matrix is one of many."""
        return any(matrix.role == "expert" for layer in self.layers for matrix in layer.matrices)

    def as_dtype(self, dtype: Dtype) -> ModelShape:
        """The same in another dtype."""
        return replace(self, dtype=dtype)

    def linear(self, layer: Layer, tokens: float) -> list[Operation]:
        """The products of one layer with so many tokens."""
        found = []
        for matrix in layer.matrices:
            touched = matrix.touched(tokens)
            found.append(
                Operation(
                    kind="linear",
                    nbytes=touched * matrix.inputs * matrix.outputs * self.itemsize,
                    rows=max(tokens * matrix.used / touched, 1),
                    dtype=self.dtype,
                    launches=max(math.ceil(touched), 1),
                )
            )
        return found

    def attention(self, sequences: float, queries: float, context: float) -> Operation:
        """The attention of one layer: so many sequences, with so many queries each over a context."""
        return Operation(
            kind="attention",
            nbytes=sequences * context * self.kv_nbytes,
            rows=queries * self.heads / self.kv_heads,
            dtype=self.dtype,
            launches=4,
        )

    def elementwise(self, tokens: float) -> Operation:
        """Norms, residual sums and activations of one layer: each reads what it needs, and writes its result."""
        return Operation(
            kind="memory",
            nbytes=tokens * (10 * self.hidden + 3 * self.ffn) * max(self.itemsize, 2),
            dtype=self.dtype,
            launches=10,
        )

    def head(self, tokens: float) -> Operation:
        """The output projection of so many tokens."""
        return Operation(kind="linear", nbytes=self.head_nbytes, rows=max(tokens, 1), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the plain ways of writing a decoder have in common; `decoder` makes a shape of it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool
    """Three matrices in the feed-forward instead of two."""
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    """Of the projection behind attention."""
    ffn_bias: bool = False
    fused_qkv: bool = False
    norms: int = 2
    """Per layer, of `hidden` values each."""
    norm_bias: bool = False
    head_norms: bool = False
    """Queries and keys are normalised, with `head_dim` values each."""
    positions: int = 0
    """Learned positions."""
    embedding_norm: bool = False
    head_bias: bool = False

    @property
    def attention(self) -> tuple[Matrix, ...]:
        """The projections around attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inputs = (("qkv", queries + 2 * keys),) if self.fused_qkv else (("q", queries), ("k", keys), ("v", keys))
        return (
            *(
                Matrix(name=name, role="attention", inputs=self.hidden, outputs=width, bias=self.attention_bias)
                for name, width in inputs
            ),
            Matrix(name="o", role="attention", inputs=queries, outputs=self.hidden, bias=self.output_bias),
        )

    def feed_forward(self, width: int, *, role: Role = "ffn", copies: int = 1, used: int = 1) -> tuple[Matrix, ...]:
        """The matrices of a feed-forward of a width."""
        names = (*(("gate",) if self.gated else ()), "up", "down")
        return tuple(
            Matrix(
                name=name,
                role=role,
                inputs=width if name == "down" else self.hidden,
                outputs=self.hidden if name == "down" else width,
                bias=self.ffn_bias,
                copies=copies,
                used=used,
            )
            for name in names
        )

    @property
    def vectors(self) -> int:
        """Parameters of a layer that are in no matrix."""
        norms = self.norms * self.hidden * (2 if self.norm_bias else 1)
        return norms + (2 * self.head_dim if self.head_norms else 0)

    @property
    def outside(self) -> int:
        """Parameters outside the layers, besides the tables."""
        norm = self.hidden * (2 if self.norm_bias else 1)
        return (
            self.positions * self.hidden
            + norm * (2 if self.embedding_norm else 1)
            + (self.vocab if self.head_bias else 0)
        )


def decoder(
    sizes: Sizes,
    *,
    name: str,
    family: str,
    dtype: Dtype,
    layers: tuple[Layer, ...] = (),
    kv_elements: int = 0,
    ffn: int = 0,
    notes: tuple[str, ...] = (),
) -> ModelShape:
    """A shape from sizes; `layers` where they are not all alike and plain, `kv_elements` where the cache is not."""
    plain = Layer(
        count=sizes.layers, matrices=(*sizes.attention, *sizes.feed_forward(sizes.ffn)), vectors=sizes.vectors
    )
    return ModelShape(
        name=name,
        layers=layers or (plain,),
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        kv_elements=kv_elements or 2 * sizes.kv_heads * sizes.head_dim,
        vocab=sizes.vocab,
        tied=sizes.tied,
        ffn=ffn or sizes.ffn,
        outside=sizes.outside,
        dtype=dtype,
        family=family,
        notes=notes,
    )
