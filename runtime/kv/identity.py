"""What the keys and values of a checkpoint depend on, so that a store never gives those of another one."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from ...memory.arena import PAGE
from ...memory.errors import CheckpointError, UsageError
from ...memory.prefix import KvIdentity

SAMPLES: Final = 64
"""Pages of each file that are looked at: reading all of a large checkpoint would take longer than a prompt."""
_HEADER_MOST: Final = 100 * 2**20
_VERSION: Final = "blocks 1"
"""Of what `prefix` stores."""
_ROPE: Final = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "max_position_embeddings")
_OF_LENGTH: Final = ("dynamic", "longrope")
_NOT_OF_THE_MODEL: Final = ("_name_or_path", "transformers_version", "attn_implementation", "use_cache")


def identity_of(
    folder: str | os.PathLike[str], config: Any, dtype: torch.dtype, *, block_tokens: int, salt: str = ""
) -> KvIdentity:
    """The identity of what a checkpoint computes.

    Args:
        folder: Of the checkpoint: its safetensors files are what is fingerprinted.
        config: Of the model.
        dtype: Of its weights and of keys and values.
        block_tokens: Of a block.
        salt: Keeps users apart, see `KvIdentity`.

    Raises:
        UsageError: there are no weights, or keys depend on more than the tokens before them.
        CheckpointError: they cannot be read.
    """
    if rope_depends_on_length(config):
        raise UsageError(
            f"keys of {config.model_type} turn with the length of the prompt that they came with: those of one prompt "
            "are of no use to another"
        )
    said = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    text = config.get_text_config(decoder=True)
    return KvIdentity(
        weights=weights_fingerprint(folder)
        + _code_fingerprint(folder)
        + hashlib.blake2b(_json(said), digest_size=16).hexdigest(),
        dtype=str(dtype),
        rope=_json({name: getattr(text, name, None) for name in _ROPE}).decode(),
        layout=_VERSION,
        block_tokens=block_tokens,
        salt=salt,
    )


def rope_depends_on_length(config: Any) -> bool:
    """Whether a token's key depends on how many tokens come with it (RoPE that is "dynamic" or "longrope")."""
    text = config.get_text_config(decoder=True)
    waiting = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        said = waiting.pop()
        if isinstance(said, dict):
            if said.get("rope_type", said.get("type")) in _OF_LENGTH:
                return True
            waiting += said.values()
    return False


def _code_fingerprint(folder: str | os.PathLike[str]) -> str:
    """A name for the code that computes: transformers', and what a checkpoint brings itself."""
    hashed = hashlib.blake2b(transformers.__version__.encode(), digest_size=16)
    for file in sorted(Path(folder).glob("*.py")):
        try:
            hashed.update(file.name.encode() + b"\0" + file.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}; check the checkpoint") from error
    return hashed.hexdigest()


def weights_fingerprint(folder: str | os.PathLike[str]) -> str:
    """A name for the weights in a folder: their files' names, sizes, times of change, headers, and pages of each.

    Weights that change get another one, and so do files that were copied anew: then prompts are computed once more.

    Raises:
        UsageError: there are none.
        CheckpointError: one cannot be read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UsageError(f"{os.fspath(folder)} has no safetensors files: their keys and values have no name")
    hashed = hashlib.blake2b(digest_size=32)
    for file in files:
        try:
            with open(file, "rb") as stream:
                facts = os.fstat(stream.fileno())
                hashed.update(struct.pack("<QQ", facts.st_size, facts.st_mtime_ns) + file.name.encode() + b"\0")
                (header,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
                hashed.update(stream.read(min(header, _HEADER_MOST)))
                for number in range(SAMPLES):
                    stream.seek(facts.st_size * number // SAMPLES)
                    hashed.update(stream.read(PAGE))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}; check the checkpoint") from error
    return hashed.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
