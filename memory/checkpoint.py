"""A checkpoint folder: which tensors it has and where their bytes lie, with no tensor read.

Either one `model.safetensors`, or shards named by `model.safetensors.index.json`, or, with neither, every
`*.safetensors` of the folder as long as no two hold a tensor of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .errors import CheckpointError
from .layout import TensorSource
from .safetensors_header import MAX_HEADER_NBYTES, parse_json, read_header, read_regular_file

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint, as places in files. Holds no file open and no bytes."""

    folder: str
    """Absolute path."""
    tensors: Mapping[str, TensorSource]
    """By name; the order is that of the files, sorted, and inside a file that of its bytes."""
    files: tuple[str, ...]
    """Absolute paths of the shards, sorted by name. Links are not resolved."""
    metadata: Mapping[str, str]
    """What the files' `__metadata__` say, later files over earlier ones."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read and check the headers of a checkpoint folder.

        Raises CheckpointError, in one line with a remedy, where the folder, its index or a header cannot be used.
        """
        folder = os.path.abspath(os.fspath(folder))
        weight_map = _read_index(folder) if _wants_index(folder) else None
        names = sorted(set(weight_map.values())) if weight_map is not None else _shards_without_index(folder)
        tensors: dict[str, TensorSource] = {}
        home: dict[str, str] = {}
        metadata: dict[str, str] = {}
        for name in names:
            header = read_header(os.path.join(folder, name))
            metadata.update(header.metadata)
            for key, tensor in header.tensors.items():
                wanted = weight_map.get(key) if weight_map is not None else None
                if key in home and wanted is None:
                    raise CheckpointError(
                        f"{folder}: the tensor {key!r} is in both {home[key]} and {name}, and no index says which "
                        "holds; keep one of the two"
                    )
                if wanted is None or wanted == name:
                    tensors[key], home[key] = tensor, name
        for key, name in (weight_map or {}).items():
            if home.get(key) != name:
                raise CheckpointError(
                    f"{folder}: {INDEX} says that {key!r} is in {name}, which lacks it; the index and the shards are "
                    "of different checkpoints: download or save it again"
                )
        files = tuple(os.path.join(folder, name) for name in names)
        return cls(folder=folder, tensors=tensors, files=files, metadata=metadata)


def _wants_index(folder: str) -> bool:
    # As transformers does: a single file is preferred over an index beside it.
    return not os.path.lexists(os.path.join(folder, SINGLE)) and os.path.lexists(os.path.join(folder, INDEX))


def _read_index(folder: str) -> dict[str, str]:
    """Tensor name to shard name; every shard name is a plain file name."""
    path = os.path.join(folder, INDEX)
    text, _ = read_regular_file(path, nbytes=MAX_HEADER_NBYTES, max_nbytes=MAX_HEADER_NBYTES)
    try:
        index = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download or save the checkpoint again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; download or save the checkpoint again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"{path}: {key!r} is said to be in {name!r}; only a plain *.safetensors name inside the folder "
                "is followed: correct the index"
            )
    for name in sorted(set(weight_map.values())):
        if not os.path.lexists(os.path.join(folder, name)):
            raise CheckpointError(f"{folder}: the shard {name!r} is missing; download or save the checkpoint again")
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", "\0"))


def _shards_without_index(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no such folder; give the folder that holds {SINGLE}") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder}: not a folder; give the folder that holds {SINGLE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error}); check the name and its permissions") from error
    if SINGLE in names:
        return [SINGLE]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return shards
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise CheckpointError(
            f"{folder}: has {pickled[0]} but no *.safetensors; only safetensors are read, since pickles run code. "
            "Convert it once: AutoModel.from_pretrained(folder).save_pretrained(new_folder) with the model's own class"
        )
    raise CheckpointError(f"{folder}: holds no *.safetensors; give the folder that holds {SINGLE}")
