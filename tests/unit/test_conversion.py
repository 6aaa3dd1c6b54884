"""transformers' conversion operations on symbolic tensors, against the same operations on real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    SplitModulelist,
    Transpose,
)

from penstock.memory.errors import CheckpointError
from penstock.memory.layout import FileSpan, TensorSource
from penstock.runtime import symbolic
from penstock.runtime.dtypes import stored_dtype
from penstock.runtime.symbolic import Call, Stored, Symbolic, evaluate, leaves, symbol

Operation = Callable[[list[torch.Tensor]], torch.Tensor]


def through(*ops: ConversionOps, targets: int = 1, pick: int = 0) -> Operation:
    """A chain of transformers' operations from one name to one or more."""

    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        sources, names = ["x"], [f"y*{i}" for i in range(targets)]
        data = {"x": list(tensors)}
        for op in ops:
            data = op.convert(
                data, source_patterns=sources, target_patterns=names, config=LlamaConfig(num_attention_heads=1)
            )
        return list(data.values())[pick]

    return run


def gate_up(tensors: list[torch.Tensor]) -> torch.Tensor:
    half = len(tensors) // 2
    data = {"g": tensors[:half], "u": tensors[half:]}
    names = {"source_patterns": ["g", "u"], "target_patterns": ["y"]}
    return Concatenate(dim=1).convert(MergeModulelist(dim=0).convert(data, **names), **names)["y"]


RUNS: list[Operation] = [
    gate_up,
    through(MergeModulelist(dim=0)),
    through(MergeModulelist(dim=1)),
    through(Concatenate(dim=0)),
    through(Concatenate(dim=1)),
    through(Chunk(dim=0), targets=3, pick=2),
    through(Chunk(dim=1), targets=2, pick=1),
    through(SplitModulelist(dim=0), pick=4),
    lambda t: t[0].split([1, 3, 2])[1],
    lambda t: t[0][2:5, 1:],
    lambda t: t[0][-1],
    lambda t: t[0][-3:-1],
    lambda t: t[0][:, 2],
    lambda t: t[0].unbind(1)[3],
    lambda t: t[0].reshape(3, 2, 4)[1].flatten().unsqueeze(0).transpose(0, 1),
    lambda t: torch.cat([t[0].to(torch.bfloat16), t[1].to(torch.bfloat16)]),
    lambda t: torch.stack([t[0], t[0]], dim=2),
    lambda t: t[0][:0],
]

CALLS: list[Operation] = [
    through(Transpose()),
    lambda t: through(PermuteForRope(permute_layer_names=["x"]))(t[:1]),
    through(Interleave(dim=0)),
    through(Interleave(dim=1), Chunk(dim=1), targets=2, pick=1),
    through(Chunk(dim=0), Transpose(), targets=1),
    lambda t: t[0].transpose(0, 1).reshape(3, 8)[1:],
    lambda t: t[0] + 1,
    lambda t: torch.cat([t[0], t[1].to(torch.bfloat16).to(torch.float32)]),
    lambda t: t[0].to(torch.bfloat16).to(torch.float32).t(),
]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[list[torch.Tensor], list[Symbolic]]:
    """Four tensors of [6, 4] in one file, in pieces, and the symbols of them."""
    torch.manual_seed(0)
    tensors = [torch.randn(6, 4) for _ in range(4)]
    path = tmp_path / "data"
    path.write_bytes(b"".join(bytes(tensor.view(torch.uint8).flatten().tolist()) for tensor in tensors))
    symbols = []
    for i in range(4):
        spans = [FileSpan(path=str(path), offset=96 * i + at, nbytes=n) for at, n in ((0, 40), (40, 56))]
        symbols.append(symbol(TensorSource(shape=(6, 4), dtype="F32", spans=tuple(spans))))
    return tensors, symbols


def read(tensor: Symbolic) -> torch.Tensor:
    assert isinstance(tensor.value, Stored)
    data = bytearray()
    for span in tensor.value.spans:
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            data += file.read(span.nbytes)
    flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
    assert tensor.value.dtype == stored_dtype(torch.float32)
    return flat.reshape(tensor.shape).to(tensor.dtype)


Tensors = tuple[list[torch.Tensor], list[Symbolic]]


@pytest.mark.parametrize("operation", RUNS)
def test_what_rearranges_runs_is_only_runs(operation: Operation, stored: Tensors) -> None:
    result, expected = operation(list(stored[1])), operation(list(stored[0]))
    assert isinstance(result, Symbolic)
    value = read(result)
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)


@pytest.mark.parametrize("operation", CALLS)
def test_the_rest_is_computed_once(operation: Operation, stored: Tensors) -> None:
    result, expected = operation(list(stored[1])), operation(list(stored[0]))
    assert isinstance(result, Symbolic)
    assert isinstance(result.value, Call)
    values = {id(leaf): read(leaf) for leaf in leaves(result)}
    value = evaluate(result, values)
    assert value.is_contiguous()
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)


def test_neighbours_become_one_run(stored: Tensors) -> None:
    whole = torch.cat(stored[1])
    assert isinstance(whole, Symbolic)
    assert isinstance(whole.value, Stored)
    assert len(whole.value.spans) == 1


def test_too_many_runs_are_computed_instead(stored: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_SPANS", 11)
    operation = through(Concatenate(dim=1))
    result = operation(list(stored[1]))
    assert isinstance(result, Symbolic)
    assert isinstance(result.value, Call)
    value = evaluate(result, {id(leaf): read(leaf) for leaf in leaves(result)})
    assert torch.equal(value, operation(list(stored[0])))


@pytest.mark.parametrize("operation", [lambda t: t.item(), lambda t: t.mul_(2), lambda t: torch.equal(t, t)])
def test_a_conversion_that_looks_at_values_is_refused(operation: Callable[[Symbolic], object], stored: Tensors) -> None:
    with pytest.raises(CheckpointError, match="values"):
        operation(stored[1][0][:1, :1])
