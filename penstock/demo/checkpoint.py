"""The demonstration's checkpoint: Llama-shaped, random, with a tokenizer of its own. Needs no network."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEAD: Final = 64
"""Width of an attention head; the hidden size is a multiple of it."""
LAYERS: Final = 24
VOCABULARY: Final = 4096
SHARD_NBYTES: Final = 256 * 2**20
TEXT_NBYTES: Final = 2**20
"""How much of the standard library the tokenizer is trained on."""
SEED: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoShape:
    """Sizes of the model. 24 layers whatever its size, so that there is always something to stream."""

    hidden_size: int

    @classmethod
    def of(cls, nbytes: int) -> DemoShape:
        """The shape whose weights come closest to `nbytes` in bf16.

        A layer has 4·h² parameters of attention and about 8·h² of feed-forward; embedding and head have h each per
        entry of the vocabulary.
        """
        a, b, c = 12 * LAYERS, 2 * VOCABULARY, nbytes / 2
        hidden = (-b + math.sqrt(b * b + 4 * a * c)) / (2 * a)
        return cls(hidden_size=max(1, round(hidden / HEAD)) * HEAD)

    def config(self) -> LlamaConfig:
        """What transformers builds the model from."""
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            intermediate_size=max(1, round(self.hidden_size * 8 / 3 / HEAD)) * HEAD,
            num_hidden_layers=LAYERS,
            num_attention_heads=self.hidden_size // HEAD,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            dtype="bfloat16",
        )

    def dims(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config())
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCheckpoint:
    """A checkpoint that has been written."""

    folder: Path
    files: tuple[Path, ...]
    weights_nbytes: int
    swept_nbytes: int
    """What a sweep must have in memory: all weights but the embedding, of which it needs some rows."""
    parameters: int
    layers: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = Tokenizer.from_file(str(self.folder / "tokenizer.json")).encode(text).ids
        return ids

    def drop_cache(self) -> None:
        """Leave none of its pages in the page cache, so that every contestant starts cold."""
        for file in self.files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(folder: Path, shape: DemoShape) -> DemoCheckpoint:
    """Write the checkpoint into an empty folder, a shard in memory at a time, and put it on the disk for good."""
    config = shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    _train_tokenizer(folder)
    dims = shape.dims()
    sizes = {name: 2 * math.prod(each) for name, each in dims.items()}
    shards = _shards(sizes)
    files = tuple(folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards)))
    for file, names in zip(files, shards, strict=True):
        save_file({name: _draw(name, dims[name]) for name in names}, file, metadata={"format": "pt"})
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return DemoCheckpoint(
        folder=folder,
        files=files,
        weights_nbytes=sum(sizes.values()),
        swept_nbytes=sum(sizes.values()) - sizes["model.embed_tokens.weight"],
        parameters=sum(sizes.values()) // 2,
        layers=LAYERS,
    )


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if filled + nbytes > SHARD_NBYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _draw(name: str, dims: tuple[int, ...]) -> torch.Tensor:
    """Values that keep activations of unit size through all layers, the same each time."""
    if name.endswith("norm.weight"):
        return torch.ones(dims, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED + sum(name.encode()) * 1009 + len(name))
    values = torch.empty(dims, dtype=torch.bfloat16).normal_(generator=generator)
    return values if name == "model.embed_tokens.weight" else values.mul_(dims[-1] ** -0.5)


def _train_tokenizer(folder: Path) -> None:
    """Byte-level BPE over the standard library's sources, which are on every machine that runs this."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts, left = [], TEXT_NBYTES
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        texts.append(file.read_text(encoding="utf-8", errors="replace")[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
