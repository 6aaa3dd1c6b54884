"""The mixture-of-experts checkpoint of the benchmarks: Qwen3-MoE-shaped, random, with routers that prefer experts.

    python -m benchmarks.moe_checkpoint                  # 16 layers of 64 experts, 2.3 B parameters, 4.7 GB
    python -m benchmarks.moe_checkpoint --shape tiny

Routers of random weights use all experts alike, and no cache would be worth anything. Here a router's logits are made
of what a made-up trace is made of (`scheduler/experts/recipe.py`), in about its proportions: what all tokens like, what
the word itself likes, and what the words before it like, the nearer the more. The hidden state has a part for each:

    [0]        a constant, which the router turns into its preference for experts by rank
    token      the embedding; nothing else is ever written there
    context    what attention gathers of the tokens before: written by attention alone
    output     what experts say: read by experts and by the head

Queries and keys are nearly the same for all tokens, so that attention is a matter of distance alone, by rotary
embedding. Sizes, and so what everything costs, are those of a model with any weights.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, Qwen3MoeConfig

from .reference_checkpoint import default_folder, done_marker, is_complete, mark_complete, write_weights

ROPE_THETA = 10000.0
FIRST_WORD_ID = 300
"""Below lie special tokens and bytes."""
_QUERY_NOISE = 0.2
"""Of queries and keys, what differs from token to token."""
_TYPICAL_POSITION = 128
"""At which the context is to weigh what it is to weigh; it weighs a little more before, and less behind."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Everything that decides the bytes of a checkpoint."""

    name: str
    vocab_size: int
    hidden_size: int
    layer_count: int
    head_count: int
    key_head_count: int
    head_size: int
    expert_count: int
    top_k: int
    expert_ffn: int
    shard_nbytes: int
    seed: int = 20250429
    zipf: float = 0.6
    token: float = 1.0
    context: float = 0.64
    """Standard deviation, like `token`: topic 0.4 and context 0.5 of the recipe together."""
    word_count: int = 1000
    word_zipf: float = 1.0

    def config(self) -> Qwen3MoeConfig:
        """The transformers configuration; no end-of-sequence id."""
        config = Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.layer_count,
            num_attention_heads=self.head_count,
            num_key_value_heads=self.key_head_count,
            head_dim=self.head_size,
            moe_intermediate_size=self.expert_ffn,
            num_experts=self.expert_count,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,
            dtype="bfloat16",
        )
        config.architectures = ["Qwen3MoeForCausalLM"]
        return config

    @property
    def expert_nbytes(self) -> int:
        """Of one expert: gate, up and down."""
        return 2 * 3 * self.hidden_size * self.expert_ffn

    @property
    def embedding_nbytes(self) -> int:
        """Of the input embedding, of which a token reads a row."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def experts_nbytes(self) -> int:
        """Of all experts."""
        return self.layer_count * self.expert_count * self.expert_nbytes

    def dims(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and dims of all tensors, as checkpoints of this family have them: experts apart."""
        hidden, wide = self.hidden_size, self.head_count * self.head_size
        keys = self.key_head_count * self.head_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.layer_count):
            above = f"model.layers.{layer}"
            yield f"{above}.input_layernorm.weight", (hidden,)
            yield f"{above}.post_attention_layernorm.weight", (hidden,)
            for name, dims in (("q", (wide, hidden)), ("k", (keys, hidden)), ("v", (keys, hidden))):
                yield f"{above}.self_attn.{name}_proj.weight", dims
            yield f"{above}.self_attn.o_proj.weight", (hidden, wide)
            yield f"{above}.self_attn.q_norm.weight", (self.head_size,)
            yield f"{above}.self_attn.k_norm.weight", (self.head_size,)
            yield f"{above}.mlp.gate.weight", (self.expert_count, hidden)
            for expert in range(self.expert_count):
                for name in ("gate", "up"):
                    yield f"{above}.mlp.experts.{expert}.{name}_proj.weight", (self.expert_ffn, hidden)
                yield f"{above}.mlp.experts.{expert}.down_proj.weight", (hidden, self.expert_ffn)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES = {
    "reference": MoeShape(
        name="moe",
        vocab_size=32000,
        hidden_size=1024,
        layer_count=16,
        head_count=16,
        key_head_count=4,
        head_size=64,
        expert_count=64,
        top_k=4,
        expert_ffn=704,
        shard_nbytes=2 * 10**9,
    ),
    "tiny": MoeShape(
        name="moe-tiny",
        vocab_size=2000,
        hidden_size=128,
        layer_count=4,
        head_count=4,
        key_head_count=2,
        head_size=32,
        expert_count=16,
        top_k=2,
        expert_ffn=64,
        shard_nbytes=10**6,
    ),
}


def draw_tensor(shape: MoeShape, name: str, dims: tuple[int, ...]) -> torch.Tensor:
    """The bf16 values of tensor `name` of shape `dims`; depends on the shape, the name and the dims only."""
    stream = np.random.Generator(np.random.SFC64([shape.seed, *name.encode()]))
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return torch.from_numpy(_values(shape, name, kind, dims, stream)).to(torch.bfloat16)


def _values(shape: MoeShape, name: str, kind: str, dims: tuple[int, ...], stream: np.random.Generator) -> Floats:
    if kind.endswith("norm"):
        return np.ones(dims, np.float32)
    normal: Floats = stream.standard_normal(dims, dtype=np.float32)
    parts = _Parts(shape.hidden_size)
    values: Floats = np.zeros(dims, np.float32)
    if kind == "embed_tokens":
        values[:, 0] = parts.constant
        values[:, parts.token] = normal[:, parts.token]
    elif kind in ("q_proj", "k_proj"):
        direction = _direction(shape)
        values[:, parts.token] = normal[:, parts.token] * (_QUERY_NOISE / math.sqrt(parts.token_size))
        values[:, 0] = np.tile(direction, dims[0] // shape.head_size) / parts.constant
    elif kind == "v_proj":
        values[:, parts.token] = normal[:, parts.token] / math.sqrt(parts.token_size)
    elif kind == "o_proj":
        gain = 1 / (_gathered(shape) * math.sqrt(shape.layer_count * dims[1]))
        values[parts.context] = normal[parts.context] * gain
    elif kind == "gate":
        layer = int(name.split(".")[2])
        ranks = stream.permutation(shape.expert_count) + 1
        values[:, 0] = -shape.zipf * np.log(ranks) / parts.constant
        values[:, parts.token] = normal[:, parts.token] * (shape.token / math.sqrt(parts.token_size))
        # As many layers as lie above have written into the context so far.
        size = parts.context_size * (layer + 1) / shape.layer_count
        values[:, parts.context] = normal[:, parts.context] * (shape.context / math.sqrt(size))
    elif kind == "down_proj":
        values[parts.output] = normal[parts.output] * math.sqrt(8 / shape.layer_count / dims[1])
    else:  # gate_proj, up_proj, lm_head
        values = normal / np.float32(math.sqrt(dims[1]))
    if kind == "lm_head":  # the best token leads by far more than a rounding, as in the other reference checkpoint
        values *= np.exp(np.float32(0.5) * stream.standard_normal((dims[0], 1), dtype=np.float32))
    return values.astype(np.float32, copy=False)


class _Parts:
    """Of a hidden state."""

    def __init__(self, hidden: int) -> None:
        half, quarter = hidden // 2, hidden // 4
        self.token = slice(1, half)
        self.context = slice(half, half + quarter)
        self.output = slice(half + quarter, hidden)
        self.token_size = half - 1
        self.context_size = quarter
        self.constant = math.sqrt(quarter)


def _direction(shape: MoeShape) -> Floats:
    """[head size] What queries and keys have in common, of mean square 1."""
    values: Floats = np.random.default_rng(shape.seed).standard_normal(shape.head_size, dtype=np.float32)
    return values / np.sqrt(np.mean(values**2))


@cache
def _gathered(shape: MoeShape) -> float:
    """Standard deviation of a weighted mean of independent values, with the weights that attention has."""
    half = shape.head_size // 2
    direction = _direction(shape).astype(np.float64)
    energy = direction[:half] ** 2 + direction[half:] ** 2
    angles = ROPE_THETA ** (-np.arange(half) / half)
    behind = np.arange(_TYPICAL_POSITION)[:, None]
    scores = (energy * np.cos(behind * angles)).sum(axis=1) / math.sqrt(shape.head_size)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return float(np.sqrt((weights**2).sum()))


def words(shape: MoeShape, count: int, *, seed: int = 0) -> list[int]:
    """Token ids of a made-up text: words come as often as their rank says."""
    often = np.arange(1, shape.word_count + 1, dtype=np.float64) ** -shape.word_zipf
    drawn = np.random.default_rng(seed).choice(shape.word_count, size=count, p=often / often.sum())
    return [FIRST_WORD_ID + int(word) for word in drawn]


def ensure_moe(folder: Path, shape: MoeShape) -> Path:
    """The folder of the checkpoint below `folder`, written if it is missing or incomplete.

    Raises OSError when the disk is too small.
    """
    checkpoint = folder / shape.name
    if is_complete(checkpoint, shape):
        return checkpoint
    print(f"writing {checkpoint} ...", file=sys.stderr, flush=True)
    checkpoint.mkdir(parents=True, exist_ok=True)
    done_marker(checkpoint).unlink(missing_ok=True)
    for trace in folder.glob(f"{shape.name}-*.trace"):  # of routers that are gone
        trace.unlink()
    config: Any = shape.config()
    config.save_pretrained(checkpoint)
    GenerationConfig.from_model_config(config).save_pretrained(checkpoint)
    write_weights(checkpoint, dict(shape.dims()), partial(draw_tensor, shape), shard_nbytes=shape.shard_nbytes)
    mark_complete(checkpoint, shape)
    return checkpoint


def main() -> None:
    """Command line: make the files and print where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder to write to (default: %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="reference")
    arguments = parser.parse_args()
    try:
        print(ensure_moe(arguments.dir, SHAPES[arguments.shape]))
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
