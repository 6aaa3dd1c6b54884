"""Where weights would lie in a file that nobody has written yet, for what is foreseen from a config.

Where a tensor begins decides how many pages a read of it takes, and where its alignment is kept, how many the slot that
it comes to has: one that fills its pages in memory straddles one more wherever the file has not put it at the start of
a page, which it seldom does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod

from torch import Tensor, nn

from ..memory.arena import round_up
from ..memory.layout import ITEMSIZE, FileSpan, TensorSource
from .dtypes import stored_dtype

_ALIGN = 8
"""Of the first tensor in a file, in bytes."""


def imagined_file(module: nn.Module, path: str) -> dict[str, TensorSource]:
    """The tensors of a model as `save_pretrained` would write them into one safetensors file.

    They follow each other without gaps after a header that names them, those of wide elements first, then by name. A
    checkpoint in shards has a header each, and one that somebody else has written may have another order: its tensors
    may then take a page more or less.

    Args:
        module: Of any device; nothing looks at values.
        path: What the file is to be called.

    Returns:
        Parameters and persistent buffers, by name; of tied ones only the first.
    """
    tensors = dict((*module.named_parameters(), *_saved_buffers(module)))
    dtypes = {name: stored_dtype(tensor.dtype) for name, tensor in tensors.items()}
    begins: dict[str, int] = {}
    at = 0
    for name in sorted(tensors, key=lambda name: (-ITEMSIZE[dtypes[name]], name)):
        begins[name] = at
        at += _nbytes(tensors[name], dtypes[name])
    start = _header_nbytes(tensors, dtypes, begins)
    sources = {}
    for name, tensor in tensors.items():
        span = FileSpan(path=path, offset=start + begins[name], nbytes=_nbytes(tensor, dtypes[name]))
        spans = (span,) if span.nbytes else ()
        sources[name] = TensorSource(shape=tuple(tensor.shape), dtype=dtypes[name], spans=spans)
    return sources


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds."""
    passing = {
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return ((name, buffer) for name, buffer in module.named_buffers() if name not in passing)


def _nbytes(tensor: Tensor, dtype: str) -> int:
    return prod(tensor.shape) * ITEMSIZE[dtype]


def _header_nbytes(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], begins: Mapping[str, int]) -> int:
    """Bytes before the first tensor: the header's length, and the header, which spaces fill up."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, begin in begins.items():
        end = begin + _nbytes(tensors[name], dtypes[name])
        entries[name] = {"dtype": dtypes[name], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return 8 + round_up(len(text.encode()), _ALIGN)
