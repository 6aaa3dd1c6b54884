"""What an export takes over from the checkpoint that a run began with: tensors that are not trained, small files."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any, Final

import torch

from ...memory.casting import cast
from ...memory.disk import DiskEngine
from ...memory.errors import CheckpointError
from ...memory.files import disk_error
from ...memory.layout import ITEMSIZE, TensorSource
from ...memory.safetensors_header import parse_json
from ...runtime.conversion import Converted
from ...runtime.dtypes import stored_dtype
from ...runtime.repacking import read_tensor
from .weightfiles import write_durably

if TYPE_CHECKING:
    from ...runtime.training.exported import ExportedTensor, Sink

PIECE: Final = 4 * 2**20
"""Bytes of a tensor that are in memory at a time."""
_COPIED: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Endings of the files beside the weights: configs, tokenizers, templates, a model's own code."""


def copy_tensor(tensor: ExportedTensor, sink: Sink) -> None:
    """Write a tensor as the source has it, cast.

    Raises:
        CheckpointError: the source became shorter.
        DiskError: it cannot be read, or not be written.
    """
    if isinstance(tensor.copied, Converted):
        _compute(tensor, tensor.copied, sink)
    elif tensor.copied is not None:
        _copy(tensor, tensor.copied, sink)


def copy_files(source: str, target: str, dtype: str) -> None:
    """Copy configs, tokenizer and the like, durably.

    Args:
        source: The checkpoint's folder.
        target: The new one's.
        dtype: What config.json is to say; "auto" for what it says.

    Raises:
        DiskError: a file cannot be read or written.
    """
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if not name.endswith(_COPIED) or name.endswith(".index.json") or not os.path.isfile(path):
            continue
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise disk_error("read", path, 0, 0, error) from error
        if name == "config.json" and dtype != "auto":
            config = parse_json(data)
            _set_dtype(config, dtype)
            if "torch_dtype" not in config:  # as older ones call it
                config["dtype"] = dtype
            data = json.dumps(config, indent=2).encode() + b"\n"
        write_durably(os.path.join(target, name), data)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Wherever a config states one; it may hold those of parts."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _copy(tensor: ExportedTensor, source: TensorSource, sink: Sink) -> None:
    at = 0
    for span in source.spans:
        try:
            with open(span.path, "rb", buffering=0) as file:
                file.seek(span.offset)
                left = span.nbytes
                while left:
                    piece = _read_whole(file, min(PIECE, left), span.path)
                    left -= len(piece)
                    at += _put(sink, tensor, at, piece, source.dtype)
        except OSError as error:
            raise disk_error("read", span.path, span.offset, span.nbytes, error) from error


def _read_whole(file: io.FileIO, nbytes: int, path: str) -> memoryview:
    found = memoryview(bytearray(nbytes))
    done = 0
    while done < nbytes:
        got = file.readinto(found[done:])
        if not got:
            raise CheckpointError(f"{path}: became shorter while it was read; bring the checkpoint back from a copy")
        done += got
    return found


def _compute(tensor: ExportedTensor, source: Converted, sink: Sink) -> None:
    """What transformers computes on loading is in memory as a whole: the one case of it."""
    engine = DiskEngine()
    try:
        stored = {key: read_tensor(engine, part) for key, part in source.sources.items()}
    finally:
        engine.close()
    (value,) = source.convert(stored).values()
    raw = value.contiguous().view(-1).view(torch.uint8).numpy()
    _put(sink, tensor, 0, raw.data.cast("B"), stored_dtype(value.dtype))


def _put(sink: Sink, tensor: ExportedTensor, at: int, data: memoryview, dtype: str) -> int:
    """Write some elements; how many bytes they became."""
    out = memoryview(bytearray(len(data) // ITEMSIZE[dtype] * ITEMSIZE[tensor.dtype]))
    cast(data, out, dtype, tensor.dtype)
    sink.write(tensor.name, at, out)
    return len(out)
