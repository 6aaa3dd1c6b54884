"""The reference checkpoint as GGUF, the only format llama.cpp reads: same bf16 weights, a filler vocabulary."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from .reference_checkpoint import (
    ROPE_THETA,
    CheckpointShape,
    ReferencePaths,
    done_marker,
    mark_complete,
    require_free_disk,
    settle,
)

try:
    import gguf
except ImportError as error:
    raise ImportError("writing GGUF needs the gguf package: pip install gguf") from error

BYTE_TOKEN_COUNT = 256
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def write_gguf(paths: ReferencePaths, shape: CheckpointShape) -> None:
    """Write `paths.gguf` from the finished checkpoint beside it, one tensor in memory at a time."""
    done_marker(paths.gguf).unlink(missing_ok=True)
    require_free_disk(paths.gguf.parent, sum(file.stat().st_size for file in paths.safetensors))
    file_by_name = _locate_tensors(paths.safetensors)
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layer_count)
    writer = gguf.GGUFWriter(paths.gguf, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_hyperparameters(writer, shape)
    _add_vocabulary(writer, shape.vocab_size)
    for name, file in file_by_name.items():
        with safe_open(file, framework="pt") as shard:
            dims = shard.get_slice(name).get_shape()
        gguf_name = name_map.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None, name
        is_vector = len(dims) == 1
        dtype = gguf.GGMLQuantizationType.F32 if is_vector else gguf.GGMLQuantizationType.BF16
        nbytes = int(np.prod(dims)) * (4 if is_vector else 2)
        writer.add_tensor_info(gguf_name, dims, np.dtype(np.uint16), nbytes, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in file_by_name.items():
        with safe_open(file, framework="pt") as shard:
            writer.write_tensor_data(_gguf_array(shard.get_tensor(name), name, shape.head_count))
    writer.close()
    for file in (paths.gguf, *paths.safetensors):
        with file.open("rb+") as opened:
            settle(opened)
    mark_complete(paths.gguf, shape)


def _locate_tensors(files: list[Path]) -> dict[str, Path]:
    located: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            located.update(dict.fromkeys(shard.keys(), file))
    return located


def _gguf_array(tensor: torch.Tensor, name: str, head_count: int) -> NDArray[np.generic]:
    """The values as llama.cpp wants them: norms in fp32; q and k with each head's rotary pairs side by side.

    transformers rotates (x[i], x[i + d/2]) and llama.cpp (x[2i], x[2i + 1]); a permutation of the rows of q and k maps
    one onto the other without changing a single score.
    """
    if tensor.dim() == 1:
        return tensor.float().numpy()
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        rows, columns = tensor.shape
        halves = tensor.view(head_count, 2, rows // head_count // 2, columns)
        tensor = halves.transpose(1, 2).reshape(rows, columns)
    array: NDArray[np.uint16] = tensor.contiguous().view(torch.uint16).numpy()
    return array


def _add_hyperparameters(writer: "gguf.GGUFWriter", shape: CheckpointShape) -> None:
    config = shape.config()
    writer.add_name(f"penstock benchmark checkpoint {shape.name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: "gguf.GGUFWriter", vocab_size: int) -> None:
    """A sentencepiece-shaped vocabulary: special tokens, bytes, and fillers. The benchmark feeds token ids."""
    tokens = [*SPECIAL_TOKENS, *(f"<0x{value:02X}>" for value in range(BYTE_TOKEN_COUNT))]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * BYTE_TOKEN_COUNT
    fillers = vocab_size - len(tokens)
    tokens += [f"▁t{number}" for number in range(fillers)]
    types += [gguf.TokenType.NORMAL] * fillers
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
