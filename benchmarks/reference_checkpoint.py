"""The reference checkpoint of the benchmarks: Llama-shaped, random, written without ever being held in memory.

    python -m benchmarks.reference_checkpoint            # 2.7 B parameters, 5.4 GB, and the same weights as GGUF
    python -m benchmarks.reference_checkpoint --shape tiny

Each tensor is drawn from its own seeded stream and goes straight to its place in its shard, so the peak is one tensor.
The files are byte for byte what `save_pretrained` writes for a newly built model with these weights: names, shards,
order and headers.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20240229
ROPE_THETA = 10000.0
FREE_DISK_MARGIN_NBYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """Everything that decides the bytes of a checkpoint."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    shard_nbytes: int
    """Largest shard, as given to `max_shard_size`."""
    seed: int = SEED

    def config(self) -> LlamaConfig:
        """The transformers configuration; no end-of-sequence id, so that every run makes the tokens asked for."""
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layer_count,
            num_attention_heads=self.head_count,
            num_key_value_heads=self.head_count,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,
            dtype="bfloat16",
        )
        config.architectures = ["LlamaForCausalLM"]
        return config


SHAPES = {
    "reference": CheckpointShape(
        name="reference",
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=6912,
        layer_count=32,
        head_count=20,
        shard_nbytes=2 * 10**9,
    ),
    "tiny": CheckpointShape(
        name="tiny",
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=768,
        layer_count=6,
        head_count=4,
        shard_nbytes=6 * 10**6,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ReferencePaths:
    """Where the files of one shape lie below the benchmark folder."""

    checkpoint: Path
    """Folder that `from_pretrained` reads."""
    gguf: Path

    @property
    def safetensors(self) -> list[Path]:
        """The shards, in the order of their names."""
        return sorted(self.checkpoint.glob("*.safetensors"))


def default_folder() -> Path:
    """`penstock-bench` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock-bench"


def reference_paths(folder: Path, shape: CheckpointShape) -> ReferencePaths:
    """Paths for `shape` below `folder`; nothing is created."""
    return ReferencePaths(checkpoint=folder / shape.name, gguf=folder / f"{shape.name}-bf16.gguf")


def done_marker(target: Path) -> Path:
    """The file beside `target` that says it is complete, and of which shape. Beside, so that the folder stays pure."""
    return target.with_name(target.name + ".done.json")


def is_complete(target: Path, shape: Any) -> bool:
    """Whether `target` was written to the end with exactly the parameters of the dataclass `shape`, and still has the
    sizes it had then."""
    marker = done_marker(target)
    if not marker.exists():
        return False
    recorded = json.loads(marker.read_text())
    return bool(recorded == {"shape": asdict(shape), "files": _file_sizes(target)})


def mark_complete(target: Path, shape: Any) -> None:
    """Record that `target` is whole."""
    done_marker(target).write_text(json.dumps({"shape": asdict(shape), "files": _file_sizes(target)}, indent=2) + "\n")


def _file_sizes(target: Path) -> dict[str, int]:
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    return {file.name: file.stat().st_size for file in files if file.exists()}


def require_free_disk(folder: Path, needed_nbytes: int) -> None:
    """Raise OSError before anything is written when `needed_nbytes` and a margin do not fit into `folder`."""
    free_nbytes = shutil.disk_usage(folder).free
    if free_nbytes < needed_nbytes + FREE_DISK_MARGIN_NBYTES:
        raise OSError(
            f"{folder} has {free_nbytes / 2**30:.1f} GiB free; this needs {needed_nbytes / 2**30:.1f} GiB and "
            f"{FREE_DISK_MARGIN_NBYTES / 2**30:.0f} GiB of room. Free some, or choose another disk with --dir."
        )


def draw_tensor(shape: CheckpointShape, name: str, dims: tuple[int, ...]) -> torch.Tensor:
    """The bf16 values of tensor `name` of shape `dims`; depends on the seed, the name and the dims only.

    Inputs of every linear have unit variance, and the branches together weigh about as much as the embedding, so
    activations stay finite through any depth and every layer has a say in the token. Rows of the head have log-normal
    norms: the best token then leads by far more than a bf16 rounding, so that implementations that round differently
    still choose the same one.
    """
    stream = np.random.Generator(np.random.SFC64([shape.seed, *name.encode()]))
    values: NDArray[np.float32] = stream.standard_normal(dims, dtype=np.float32)
    if name.endswith("norm.weight"):
        values = 1 + np.float32(0.1) * values
    elif not name.endswith("embed_tokens.weight"):
        branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
        values *= np.float32(math.sqrt((8 / shape.layer_count if branch_end else 1) / dims[1]))
    if name == "lm_head.weight":
        values *= np.exp(np.float32(0.5) * stream.standard_normal((dims[0], 1), dtype=np.float32))
    return torch.from_numpy(values).to(torch.bfloat16)


def write_checkpoint(folder: Path, shape: CheckpointShape) -> None:
    """Write config, generation config, shards and index of `shape` into `folder`, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    done_marker(folder).unlink(missing_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).bfloat16()
    dims = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_weights(folder, dims, partial(draw_tensor, shape), shard_nbytes=shape.shard_nbytes)
    mark_complete(folder, shape)


Draw = Callable[[str, tuple[int, ...]], torch.Tensor]
"""(name, dims) → the bf16 values of a tensor."""


def write_weights(folder: Path, dims: Mapping[str, tuple[int, ...]], draw: Draw, *, shard_nbytes: int) -> None:
    """Write shards and index of bf16 tensors as `save_pretrained` would, one tensor in memory at a time.

    Raises OSError before anything is written when the disk is too small.
    """
    state_dict = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in dims.items()}
    require_free_disk(folder, sum(tensor.nbytes for tensor in state_dict.values()))
    split = split_torch_state_dict_into_shards(
        state_dict, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_nbytes
    )
    for filename, names in split.filename_to_tensors.items():
        _write_shard(folder / filename, draw, {name: dims[name] for name in names})
    if split.is_sharded:
        metadata = {"total_parameters": sum(map(math.prod, dims.values())), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(path: Path, draw: Draw, dims_by_name: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file: 8 bytes of header length, JSON padded to 8 bytes, then the tensors sorted by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in sorted(dims_by_name.items()):
        end = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in sorted(dims_by_name.items()):
            file.write(draw(name, dims).view(torch.uint8).numpy().data)
        settle(file)


def settle(file: BinaryIO) -> None:
    """Put what was written on the disk and leave the page cache clean, so that later readers start cold."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ensure_reference(folder: Path, shape: CheckpointShape, *, with_gguf: bool) -> ReferencePaths:
    """Write whatever of `shape` is missing or incomplete below `folder`; messages go to stderr.

    Raises OSError when the disk is too small and ImportError when `with_gguf` is asked for without the gguf package.
    """
    paths = reference_paths(folder, shape)
    for step in _missing_steps(paths, shape, with_gguf=with_gguf):
        print(f"writing {step} ...", file=sys.stderr, flush=True)
        if step == paths.checkpoint:
            write_checkpoint(step, shape)
        else:
            from .reference_gguf import write_gguf  # only this step needs the gguf package

            write_gguf(paths, shape)
    return paths


def _missing_steps(paths: ReferencePaths, shape: CheckpointShape, *, with_gguf: bool) -> Iterator[Path]:
    if not is_complete(paths.checkpoint, shape):
        yield paths.checkpoint
    if with_gguf and not is_complete(paths.gguf, shape):
        yield paths.gguf


def main() -> None:
    """Command line: make the files and print where they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_checkpoint", description=__doc__)
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder to write to (default: %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="reference")
    parser.add_argument("--no-gguf", action="store_true", help="leave out the GGUF file that llama.cpp reads")
    arguments = parser.parse_args()
    try:
        paths = ensure_reference(arguments.dir, SHAPES[arguments.shape], with_gguf=not arguments.no_gguf)
    except (OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(paths.checkpoint)
    if not arguments.no_gguf:
        print(paths.gguf)


if __name__ == "__main__":
    main()
