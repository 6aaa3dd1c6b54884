"""Tensors that stand for bytes in files, so that somebody else's tensor code says where a result's bytes lie.

A `Symbolic` has shape and dtype but no storage. Views, chunks, stacks and concatenations of symbolic tensors only
rearrange runs of bytes, which is worked out here; any other operation is written down, to be replayed once on real
tensors. Running transformers' own conversion operations on symbolic tensors therefore gives, by construction, what
from_pretrained would compute, without a byte read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from ..memory.errors import CheckpointError
from ..memory.layout import ITEMSIZE, FileSpan, TensorSource
from .dtypes import torch_dtype

MAX_SPANS: Final = 2048
"""A tensor in more pieces than this is computed once instead: pieces that small would be read slower than they are
repacked (a 4096 by 4096 bf16 matrix in 2048 pieces has 16 KiB each)."""

_aten: Final = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Bytes of files, in row-major order, perhaps cast when they are read."""

    dtype: str
    spans: tuple[FileSpan, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A result of an operation on other symbolic tensors, to be computed once."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int | None
    """Which of the operation's results; None where it has one."""


class Symbolic(torch.Tensor):
    """A tensor without storage that knows where its value comes from."""

    value: Stored | Call

    @staticmethod
    def __new__(cls, value: Stored | Call, shape: Sequence[int], dtype: torch.dtype) -> Symbolic:
        """A symbolic tensor on the CPU, contiguous."""
        device = torch.device("cpu")
        result: Symbolic = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        result.value = value
        return result

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Shape and dtype; there are no elements to show."""
        return f"Symbolic({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Work out the result's runs, or write the operation down."""
        kwargs = kwargs or {}
        if func in _UNANSWERABLE or func._schema.is_mutable:
            raise CheckpointError(f"{func}: a weight conversion that depends on values cannot be planned")
        shapes = _on_meta(func, args, kwargs)
        inputs = _tensors((args, kwargs))
        if all(isinstance(item, Symbolic) and isinstance(item.value, Stored) for item in inputs):
            handler = _HANDLERS.get(func)
            spans = handler(args, kwargs, shapes) if handler is not None else None
            if spans is not None:
                return _wrap(shapes, [Stored(dtype=inputs[0].value.dtype, spans=item) for item in spans])
        many = isinstance(shapes, tuple | list)
        count = len(shapes) if many else 1
        calls = [Call(func=func, args=args, kwargs=kwargs, output=i if many else None) for i in range(count)]
        return _wrap(shapes, calls)


def symbol(source: TensorSource) -> Symbolic:
    """The symbolic tensor of a tensor in files."""
    return Symbolic(Stored(dtype=source.dtype, spans=source.spans), source.shape, torch_dtype(source.dtype))


def leaves(tensor: Symbolic) -> list[Symbolic]:
    """The tensors in files that a symbolic tensor is computed from, each once."""
    found: dict[int, Symbolic] = {}
    visited: set[int] = set()
    stack = [tensor]
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item.value, Stored):
            found[id(item)] = item
        else:
            stack += [each for each in _tensors((item.value.args, item.value.kwargs)) if isinstance(each, Symbolic)]
    return list(found.values())


def evaluate(tensor: Symbolic, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Compute a symbolic tensor from the stored tensors of its leaves, keyed by the leaf's id. Contiguous."""
    if id(tensor) in values:
        return values[id(tensor)].to(tensor.dtype)
    assert isinstance(tensor.value, Call)
    call = tensor.value
    args, kwargs = tree_map_only(Symbolic, lambda item: evaluate(item, values), (call.args, dict(call.kwargs)))
    # A symbolic tensor calls itself contiguous, so a reshape arrives as a view, which the real tensor may refuse.
    func = _aten.reshape.default if call.func in _VIEWS else call.func
    with torch.no_grad():
        result = func(*args, **kwargs)
    real: torch.Tensor = result if call.output is None else result[call.output]
    return real.contiguous()


def _tensors(tree: Any) -> list[Any]:
    return [item for item in tree_flatten(tree)[0] if isinstance(item, torch.Tensor)]


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` returns, as meta tensors: its shapes and dtypes."""

    def meta(item: torch.Tensor) -> torch.Tensor:
        return torch.empty(item.shape, dtype=item.dtype, device="meta")

    args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("meta")
    # Only the shapes are wanted, and meta storage cannot be pinned.
    kwargs = {key: item for key, item in kwargs.items() if key != "pin_memory"}
    return func(*args, **kwargs)


def _wrap(shapes: Any, values: Sequence[Stored | Call]) -> Any:
    if isinstance(shapes, torch.Tensor):
        return Symbolic(values[0], shapes.shape, shapes.dtype)
    wrapped = [Symbolic(value, item.shape, item.dtype) for item, value in zip(shapes, values, strict=True)]
    return tuple(wrapped) if isinstance(shapes, tuple) else wrapped


# Each handler takes an operation's arguments and its results' shapes, and returns the spans of each result, or None
# where the result is not a few runs of bytes.
_Spans = tuple[FileSpan, ...]
_Handler = Callable[[tuple[Any, ...], dict[str, Any], Any], "list[_Spans] | None"]


def _spans(tensor: Symbolic) -> _Spans:
    assert isinstance(tensor.value, Stored)
    return tensor.value.spans


def _same_bytes(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> list[_Spans]:
    return [_spans(args[0])]


def _cast(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: torch.Tensor) -> list[_Spans] | None:
    tensor = args[0]
    # A second cast may round where one would not: fp32 to fp16 to fp32.
    already_cast = tensor.dtype != torch_dtype(tensor.value.dtype)
    return None if already_cast and shapes.dtype != tensor.dtype else [_spans(tensor)]


def _permute(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: torch.Tensor) -> list[_Spans] | None:
    # Moving dimensions of size 1 about moves no byte.
    source = torch.empty_strided(args[0].shape, _dense_strides(args[0].shape), device="meta")
    func = _aten.permute.default if isinstance(args[1], list | tuple) else _aten.transpose.int
    moved = func(source, *args[1:], **kwargs)
    return [_spans(args[0])] if moved.is_contiguous() else None


def _dense_strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Sequence[torch.Tensor]) -> list[_Spans] | None:
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
    return _cut(args[0], dim, [shape.shape[dim] for shape in shapes])


def _unbind(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Sequence[torch.Tensor]) -> list[_Spans] | None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    return _cut(args[0], dim, [1] * args[0].shape[dim])


def _select(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: torch.Tensor) -> list[_Spans] | None:
    tensor, dim, index = args
    dim, size = dim % tensor.ndim, tensor.shape[dim]
    index %= size
    pieces = _cut(tensor, dim, [index, 1, size - index - 1])
    return pieces and pieces[1:2]


def _slice(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: torch.Tensor) -> list[_Spans] | None:
    tensor, dim, start, _, step = list(args) + [0, None, None, 1][len(args) - 1 :]
    if kwargs or step != 1:
        return None
    dim, size, length = dim % tensor.ndim, tensor.shape[dim], shapes.shape[dim]
    start = min(max(0, start + size if (start or 0) < 0 else start or 0), size)
    pieces = _cut(tensor, dim, [start, length, size - start - length])
    return pieces and pieces[1:2]


def _cut(tensor: Symbolic, dim: int, sizes: list[int]) -> list[_Spans] | None:
    """The pieces of a tensor along one dimension."""
    outer = prod(tensor.shape[:dim])
    if outer > MAX_SPANS:
        return None
    assert isinstance(tensor.value, Stored)
    row = prod(tensor.shape[dim + 1 :]) * ITEMSIZE[tensor.value.dtype]
    lengths = [size * row for _ in range(outer) for size in sizes]
    pieces = list(_deal(tensor.value.spans, lengths))
    joined = [_join(span for piece in pieces[i :: len(sizes)] for span in piece) for i in range(len(sizes))]
    return joined if all(len(spans) <= MAX_SPANS for spans in joined) else None


def _deal(spans: _Spans, lengths: list[int]) -> Iterator[list[FileSpan]]:
    """Cut the bytes of `spans`, in order, into pieces of the given lengths."""
    rest = list(reversed(spans))
    for length in lengths:
        piece = []
        while length:
            span = rest.pop()
            taken = min(length, span.nbytes)
            piece.append(FileSpan(path=span.path, offset=span.offset, nbytes=taken))
            if taken < span.nbytes:
                rest.append(FileSpan(path=span.path, offset=span.offset + taken, nbytes=span.nbytes - taken))
            length -= taken
        yield piece


def _join(spans: Iterator[FileSpan]) -> _Spans:
    """The same bytes in the same order, in as few spans as can be."""
    joined: list[FileSpan] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and last.path == span.path and last.offset + last.nbytes == span.offset:
            joined[-1] = FileSpan(path=last.path, offset=last.offset, nbytes=last.nbytes + span.nbytes)
        else:
            joined.append(span)
    return tuple(joined)


def _cat(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: torch.Tensor) -> list[_Spans] | None:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % shapes.ndim
    if len({(item.value.dtype, item.dtype) for item in tensors}) > 1:
        return None
    outer = prod(shapes.shape[:dim])
    if outer * len(tensors) > MAX_SPANS:
        return None
    rows = []
    for item in tensors:
        length = item.numel() * ITEMSIZE[item.value.dtype] // outer if outer else 0
        rows.append(list(_deal(_spans(item), [length] * outer)))
    joined = _join(span for i in range(outer) for row in rows for span in row[i])
    return [joined] if len(joined) <= MAX_SPANS else None


_VIEWS: Final = (_aten.view.default, _aten._unsafe_view.default)
_UNANSWERABLE: Final = (_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default)

_HANDLERS: Final[dict[Any, _Handler]] = {
    **dict.fromkeys(_VIEWS, _same_bytes),
    _aten.alias.default: _same_bytes,
    _aten.detach.default: _same_bytes,
    _aten.clone.default: _same_bytes,
    _aten.unsqueeze.default: _same_bytes,
    _aten.squeeze.default: _same_bytes,
    _aten.squeeze.dim: _same_bytes,
    _aten.squeeze.dims: _same_bytes,
    _aten._to_copy.default: _cast,
    _aten.transpose.int: _permute,
    _aten.permute.default: _permute,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.unbind.int: _unbind,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.cat.default: _cat,
    # Stacking along a dimension is concatenating along it, seen by bytes.
    _aten.stack.default: _cat,
}
