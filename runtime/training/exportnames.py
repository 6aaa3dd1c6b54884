"""By what names an export writes its tensors, and where the elements of each parameter go: the way back from a model to
the checkpoint that it was loaded from."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from ...memory.layout import ITEMSIZE, TensorSource
from ...memory.safetensors_header import same_bytes
from ..conversion import Converted
from ..dtypes import stored_dtype
from ..pretrained import Skeleton
from .exported import ExportedTensor, Run, whole_runs

Drafted = tuple[list[ExportedTensor], Mapping[str, Sequence[Run]]]


def as_named(bones: Skeleton, names: Sequence[str]) -> Drafted:
    """By the model's own names."""
    trained = set(names)
    tensors = [
        ExportedTensor(
            name=name,
            dtype=stored_dtype(bones.dtypes[name]),
            shape=tuple(bones.model.get_parameter_or_buffer(name).shape),
            copied=None if name in trained else source,
        )
        for name, source in bones.sources.items()
    ]
    return tensors, whole_runs([tensor for tensor in tensors if tensor.name in trained])


def as_stored(bones: Skeleton, names: Sequence[str]) -> Drafted | None:
    """By the names of the checkpoint; None where a trained parameter cannot be taken apart again."""
    stored, trained = bones.checkpoint.tensors, set(names)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    used: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    places = _Places(stored)
    for name, source in bones.sources.items():
        if isinstance(source, Converted) and name in trained:
            return None
        parts = list(source.sources.values()) if isinstance(source, Converted) else [source]
        for run in (run for part in parts for run in places.runs(part)):
            used[run.name] += run.elements
            if isinstance(source, TensorSource):
                dtypes.setdefault(run.name, set()).add(stored_dtype(bones.dtypes[name]))
            if name in trained:
                runs[name].append(run)
                filled[run.name] += run.elements
    for name, alias in _stored_ties(bones, used):
        dtypes[alias] = {stored_dtype(bones.dtypes[name])}
        if name in trained:
            elements = prod(stored[alias].shape)
            runs[name].append(Run(start=0, elements=elements, name=alias, at=0))
            filled[alias] += elements
    if any(used[name] > prod(stored[name].shape) for name in used) or any(len(kinds) > 1 for kinds in dtypes.values()):
        return None
    tensors = [
        ExportedTensor(
            name=name,
            dtype=next(iter(dtypes.get(name, {source.dtype}))),
            shape=source.shape,
            copied=None if filled[name] == prod(source.shape) else source,
        )
        for name, source in stored.items()
    ]
    return tensors, runs


def _stored_ties(bones: Skeleton, used: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Tied parameters that the checkpoint stores once more, and by what name."""
    known: dict[int, list[str]] = {}
    for name, parameter in bones.model.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
    tied = [names[0] for names in known.values() if len(names) > 1]
    spare = {name: source for name, source in bones.checkpoint.tensors.items() if source.nbytes and not used[name]}
    for alias, other in spare.items():
        for name in tied:
            one = bones.sources.get(name)
            if not isinstance(one, TensorSource) or (one.shape, one.dtype) != (other.shape, other.dtype):
                continue
            if same_bytes(one.spans, other.spans):
                yield name, alias
                break


class _Places:
    """Which stored tensor has the bytes at a place of a file."""

    def __init__(self, stored: Mapping[str, TensorSource]) -> None:
        self._sorted: dict[str, list[tuple[int, int, str]]] = {}
        for name, source in stored.items():
            for span in source.spans:
                self._sorted.setdefault(span.path, []).append((span.offset, span.offset + span.nbytes, name))
        for tensors in self._sorted.values():
            tensors.sort()

    def runs(self, source: TensorSource) -> Iterator[Run]:
        """The elements of a source, by the stored tensors that they lie in."""
        size, start = ITEMSIZE[source.dtype], 0
        for span in source.spans:
            tensors, at = self._sorted[span.path], span.offset
            while at < span.offset + span.nbytes:
                begin, end, name = tensors[bisect.bisect_right(tensors, at, key=lambda each: each[0]) - 1]
                nbytes = min(end, span.offset + span.nbytes) - at
                assert nbytes > 0, (name, span)
                yield Run(start=start, elements=nbytes // size, name=name, at=(at - begin) // size)
                start += nbytes // size
                at += nbytes
