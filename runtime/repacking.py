"""Sources of a model's tensors as bytes in files: what transformers computes from several tensors is computed once.

Renames, splits and merges along the first axis are spans of the checkpoint's own files. The rest (arithmetic, strided
copies) is written to scratch files when the model is loaded, spread over the drives that were named.
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from ..memory.arena import HostArena, round_up
from ..memory.casting import castable
from ..memory.disk import DiskEngine
from ..memory.errors import CheckpointError
from ..memory.image import bounces_of
from ..memory.layout import FileSpan, TensorSource
from .conversion import Converted
from .dtypes import stored_dtype, torch_dtype
from .launch import check_room, open_scratch, scratch_files
from .pretrained import Skeleton

logger = logging.getLogger(__name__)


def on_disk(bones: Skeleton, folders: Sequence[str], budget: int | None, held: ExitStack) -> dict[str, TensorSource]:
    """Every source as bytes in a file.

    Args:
        folders: Where scratch files may go; empty for the default one. Those that are named are opened in any case, so
            that a wrong name is an error today and not with the first model that needs it.
        budget: Bytes that scratch files may take.
        held: Closes the scratch folders.

    Raises:
        CheckpointError: a tensor is stored in a way that cannot be read as what the model computes with.
        DiskError: the scratch files do not fit their drives, or the budget.
    """
    stored = _StoredSpans(bones)
    plain = {name: source for name, source in bones.sources.items() if isinstance(source, TensorSource)}
    found = {name: source if stored.holds(source) else replace(source, skew=0) for name, source in plain.items()}
    converted = {name: source for name, source in bones.sources.items() if isinstance(source, Converted)}
    scratches = open_scratch(folders, held) if folders or converted else []
    if converted:
        check_room(scratches, sum(round_up(source.nbytes) for source in converted.values()), budget)
        logger.info(
            "repacking %d tensors that this model stores in another layout than it computes with", len(converted)
        )
        found.update(_repack(converted, scratch_files(scratches, "repacked.bin")))
    for name, source in found.items():
        target = stored_dtype(bones.dtypes[name])
        if not castable(source.dtype, target):
            raise CheckpointError(
                f"tensor {name} is stored as {source.dtype} and cannot be read as {target}: quantised checkpoints are "
                f"not supported yet; use the unquantised one"
            )
    return {name: found[name] for name in bones.sources}


class _StoredSpans:
    """Where each stored tensor lies, to be asked quickly."""

    def __init__(self, bones: Skeleton) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}
        for stored in bones.checkpoint.tensors.values():
            for span in stored.spans:
                self._spans.setdefault(span.path, []).append((span.offset, span.offset + span.nbytes))
        for spans in self._spans.values():
            spans.sort()

    def holds(self, source: TensorSource) -> bool:
        """Whether a resident model maps the tensor where its file has it: it is one stored tensor, or a part of one."""
        if len(source.spans) != 1:
            return False
        (span,) = source.spans
        spans = self._spans.get(span.path, [])
        index = bisect_right(spans, (span.offset, sys.maxsize)) - 1
        return index >= 0 and span.offset + span.nbytes <= spans[index][1]


def _repack(converted: Mapping[str, Converted], paths: Sequence[str]) -> dict[str, TensorSource]:
    """Compute each tensor and write it to the file that is shortest so far."""
    engine = DiskEngine()
    found: dict[str, TensorSource] = {}
    ends = dict.fromkeys(paths, 0)
    staging = HostArena(4 * 2**20, tier="staging")
    try:
        for name, source in converted.items():
            stored = {key: read_tensor(engine, part) for key, part in source.sources.items()}
            value = source.convert(stored)[name].contiguous()
            path = min(ends, key=lambda path: ends[path])
            raw = value.view(-1).view(torch.uint8)
            for start in range(0, len(raw), staging.nbytes):
                piece = raw[start : start + staging.nbytes]
                torch.frombuffer(staging.view(0, len(piece)), dtype=torch.uint8).copy_(piece)
                engine.write(path, ends[path] + start, staging.view(0, round_up(len(piece)))).wait()
            span = FileSpan(path=path, offset=ends[path], nbytes=len(raw))
            found[name] = TensorSource(shape=tuple(value.shape), dtype=stored_dtype(value.dtype), spans=(span,), skew=0)
            ends[path] += round_up(len(raw))
    finally:
        engine.close()
        staging.close()
    return found


def read_tensor(engine: DiskEngine, source: TensorSource, dtype: str | None = None) -> torch.Tensor:
    """A whole tensor in fresh memory, cast on the way if asked."""
    target = dtype or source.dtype
    found = torch.empty(source.shape, dtype=torch_dtype(target))
    if source.nbytes == 0:
        return found
    raw = found.view(-1).view(torch.uint8).numpy().data.cast("B")
    engine.read([], bounces_of(source, target), raw).wait()
    return found
