"""Arguments, results and caches on their way between device and CPU. The device is torch's idea of one: a fake."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from zoo import ZOO, llama_config

from penstock.runtime import caches
from penstock.runtime.arguments import Bundle, portable, replaced, rows_of, rows_of_root
from penstock.runtime.crossing import EmulatedCrossing, Twins

CUDA = torch.device("cuda", 0)


class FakeCrossing:
    """To and from a device that has shapes and no bytes, and refuses to compute with tensors of two places."""

    def __init__(self) -> None:
        self.crossed = 0

    def away(self, tensor: Tensor) -> bool:
        return tensor.device == CUDA

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.crossed += len(tensors)
        return [torch.empty_like(tensor, device="cpu") for tensor in tensors]

    def leaving(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return partial(self.to_host, tensors)

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.crossed += len(tensors)
        return [torch.empty_like(tensor, device=CUDA) for tensor in tensors]


@pytest.fixture
def crossing() -> Iterator[FakeCrossing]:
    with FakeTensorMode(), torch.no_grad():
        yield FakeCrossing()


def on_cpu(value: Any) -> list[str]:
    """The devices of a cache's tensors."""
    return sorted({v.device.type for layer in value.layers for v in vars(layer).values() if isinstance(v, Tensor)})


def test_a_layer_of_llama_runs_on_the_cpu_between_layers_on_the_device(crossing: FakeCrossing) -> None:
    config = llama_config(num_hidden_layers=2)
    config._attn_implementation = "sdpa"
    here = LlamaDecoderLayer(config, 1).eval()
    state = DynamicCache(config=config)
    twins = Twins()

    def arguments(length: int) -> tuple[tuple[Tensor], dict[str, Any]]:
        past = state.get_seq_length(1)
        hidden = torch.empty(2, length, 64, device=CUDA)
        mask = torch.zeros(1, 1, length, past + length, device=CUDA).expand(2, 1, -1, -1)
        embedding = (torch.empty(1, length, 16, device=CUDA), torch.empty(1, length, 16, device=CUDA))
        return (hidden,), {"attention_mask": mask, "position_embeddings": embedding, "past_key_values": state}

    def to_host(tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type == "cpu" else crossing.to_host([tensor])[0]

    def to_device(tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type == "cuda" else crossing.to_device([tensor])[0]

    def device_calls(length: int) -> None:
        caches.move(state, {1}, to_device)
        state.update(*(torch.empty(2, 2, length, 16, device=CUDA) for _ in range(2)), 1)

    def cpu_calls(length: int) -> None:
        args, kwargs = arguments(length)
        caches.move(state, {1}, to_host)
        bundle = Bundle(crossing, twins)
        moved, named = bundle.to_host(args, kwargs, CUDA)
        assert bundle.to_device(here(*moved, **named)).device == CUDA

    device_calls(5)
    assert on_cpu(state) == ["cuda"]
    cpu_calls(1)
    cpu_calls(1)
    assert on_cpu(state) == ["cpu"]
    device_calls(3)
    assert on_cpu(state) == ["cuda"]
    assert state.get_seq_length(1) == 10
    with pytest.raises(RuntimeError, match="same device"):
        here.mlp(*arguments(1)[0])  # so that the fake device would have noticed


def test_a_mask_crosses_once_and_hidden_states_stay_where_they_are_wanted(crossing: FakeCrossing) -> None:
    twins = Twins()
    mask, hidden = torch.empty(4, 4, device=CUDA), torch.empty(3, 8, device=CUDA)
    for layer in range(3):
        bundle = Bundle(crossing, twins)
        (state, seen), _ = bundle.to_host((hidden, mask), {}, CUDA)
        assert state.device.type == seen.device.type == "cpu"
        hidden = bundle.to_device(state + 1)
        assert crossing.crossed == 3 + layer, "hidden states and mask to the CPU, then only results to the device"
    del bundle
    assert len(twins) == 2, "the originals of two hidden states are gone"
    twins.end_of_call()
    assert twins.find(mask) is not None
    assert twins.find(hidden) is None


def test_what_was_changed_is_not_taken_for_its_copy() -> None:
    twins = Twins()
    with torch.no_grad():
        for change in ("original", "copy"):
            tensor = torch.zeros(3)
            copy = tensor.clone()
            twins.add(tensor, copy)
            assert twins.find(tensor) is copy
            (tensor if change == "original" else copy).add_(1)
            assert twins.find(tensor) is None
    with torch.inference_mode():
        silent = torch.zeros(3)
        twins.add(silent, silent.clone())
        assert twins.find(silent) is None
    del tensor, silent
    gc.collect()
    assert len(twins) == 0


def test_what_a_call_writes_into_its_arguments_is_written_back() -> None:
    bundle = Bundle(EmulatedCrossing(), Twins())
    with torch.inference_mode():
        written, passed = torch.zeros(2, 3), torch.ones(4)
        moved, named = bundle.to_host((written,), {"states": [passed, 7], "device": torch.device("cpu")}, CUDA)
        moved[0].add_(5)
        result = bundle.to_device({"same": named["states"][0], "new": (moved[0] * 2, None)})
    assert written.tolist() == [[5.0] * 3] * 2
    assert result["same"] is passed, "what is handed through is the caller's own"
    assert result["new"][0].tolist() == [[10.0] * 3] * 2


def test_emulated_copies_lie_as_their_originals() -> None:
    store = torch.arange(4096.0)
    for tensor in (
        store[3:67].view(8, 8),
        store[:640].view(10, 64)[:, 1:5],
        store[:64].view(8, 8).t(),
        store[5:6].expand(3, 4),
        store[:4].view(1, 4).expand(6, 4),
        store[:0],
        torch.tensor(3),
        torch.ones(3, 3, dtype=torch.bool)[1:],
    ):
        (copy,) = EmulatedCrossing().to_host([tensor])
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert not tensor.numel() or (copy.data_ptr() - tensor.data_ptr()) % 64 == 0
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
        assert not copy.is_inference()


def test_rows() -> None:
    hidden, ids = torch.empty(2, 5, 8), torch.zeros(2, 7, dtype=torch.long)
    assert rows_of((hidden, ids), {}) == 10
    assert rows_of((ids,), {}) == 14
    assert rows_of((), {"attention_mask": ids[:, :3], "hidden_states": hidden}) == 10
    assert rows_of((torch.empty(9),), {}) == 1
    assert rows_of((torch.tensor(1.0),), {}) == 1
    assert rows_of((None, 3), {"x": (hidden,)}) is None
    assert rows_of_root((), {"attention_mask": ids, "decoder_input_ids": ids[:, :1], "states": hidden}) == 2


def test_what_is_portable() -> None:
    plain = (None, 1, "a", torch.float32, [torch.empty(2), (torch.empty(1),)], {"a": torch.empty(1)}, torch.Size([2]))
    assert portable(plain, ())
    assert not portable(object(), ())
    assert not portable([1, object()], ())
    assert not portable(torch.nn.Parameter(torch.empty(1)), ())
    assert not portable(torch.eye(2).to_sparse(), ())
    assert not portable(transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.empty(1)), ())


def test_which_caches_move() -> None:
    config = llama_config()

    class Mine(DynamicCache):
        pass

    dynamic = DynamicCache(config=config)
    assert caches.can_move(dynamic, {0})
    assert caches.can_move(StaticCache(config=config, max_cache_len=8), {0, 1})
    assert caches.can_move(EncoderDecoderCache(dynamic, DynamicCache(config=config)), {2})
    assert not caches.can_move(dynamic, ()), "a module whose entry is not known"
    assert not caches.can_move(Mine(config=config), {0}), "of a class of a model's own"
    assert not caches.can_move(EncoderDecoderCache(dynamic, Mine(config=config)), {0})
    dynamic.offloading = True
    assert not caches.can_move(dynamic, {0}), "moved about by itself"
    assert caches.is_cache(dynamic)
    assert not caches.is_cache({})


@pytest.mark.parametrize("name", ["gemma3", "mamba", "llama"])
def test_every_tensor_of_a_layer_moves(name: str) -> None:
    """What a cache of that kind holds after a prompt, all of it, of the layers that are asked for."""
    model: Any = ZOO[name].build()
    with torch.no_grad():
        state = model(**ZOO[name].inputs(), use_cache=True)
        state = state.past_key_values if hasattr(state, "past_key_values") else state.cache_params
    seen: list[int] = []

    def carry(tensor: Tensor) -> Tensor:
        seen.append(id(tensor))
        return tensor.to("meta")

    assert caches.can_move(state, {1})
    caches.move(state, {1}, carry)
    assert seen

    def kinds(layer: Any) -> set[str]:
        found = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        found += [
            item
            for value in vars(layer).values()
            if isinstance(value, dict)
            for item in value.values()
            if isinstance(item, Tensor)
        ]
        return {tensor.device.type for tensor in found}

    assert kinds(state.layers[1]) == {"meta"}
    assert state.layers[1].device.type == "meta"
    assert kinds(state.layers[0]) == {"cpu"}


def test_containers_in_which_nothing_changes_stay() -> None:
    value = {"a": [1, (2, 3)], "b": torch.Size([4])}
    assert replaced(value, lambda leaf: leaf) is value
    assert replaced(value, lambda leaf: 9 if leaf == 2 else leaf) == {"a": [1, (9, 3)], "b": torch.Size([4])}
