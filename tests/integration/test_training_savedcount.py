"""What a forward saves, counted without running it: against what autograd saves in a real one."""

from __future__ import annotations

import random as rng
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_cases import UNet, restore

from penstock.runtime.recompute import segments_of
from penstock.runtime.training.savedcount import NotCountedError, count_saved, forward_saves, without_bytes
from penstock.runtime.training.saves import ForwardSaves

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
BATCH, CONTEXT, VOCAB = 3, 24, 128
NARROW: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def llama(**changes: Any) -> Any:
    sizes = {**NARROW, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCAB, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **T5, **tokens))


def resnet() -> Any:
    config = transformers.ResNetConfig(image_size=32, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2])
    return transformers.ResNetForImageClassification(config)


def speak(model: Any) -> Tensor:
    ids = torch.randint(2, VOCAB, (BATCH, CONTEXT))
    loss: Tensor = model(input_ids=ids, labels=ids.clone(), use_cache=False).loss
    return loss


def speak_of_several(model: Any) -> Tensor:
    """Two documents in each sequence."""
    ids, positions = (
        torch.randint(2, VOCAB, (BATCH, CONTEXT)),
        torch.cat([torch.arange(10), torch.arange(CONTEXT - 10)]),
    )
    apart = positions.expand(BATCH, CONTEXT)
    loss: Tensor = model(input_ids=ids, labels=ids.clone(), position_ids=apart.clone(), use_cache=False).loss
    return loss


def look(model: Any) -> Tensor:
    loss: Tensor = model(pixel_values=torch.randn(BATCH, 3, 32, 32), labels=torch.zeros(BATCH, dtype=torch.long)).loss
    return loss


def inner(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from inner(each)


class Seen:
    """What autograd saves in a real forward: by layer, and of all."""

    def __init__(self, model: nn.Module, run: Callable[[Any], Tensor]) -> None:
        self.layers: list[int] = []
        self.every = 0
        self._storages = {id(o): o.untyped_storage() for o in (*model.parameters(), *model.buffers())}
        self._at = {storage.data_ptr() for storage in self._storages.values()}
        self._given: set[int] | None = None
        hooks = []
        for path in segments_of(model):
            layer = model.get_submodule(path)
            hooks.append(layer.register_forward_pre_hook(self._begin, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._end))
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            run(model.train())
        for hook in hooks:
            hook.remove()

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = {each.untyped_storage().data_ptr() for each in inner([*args, *kwargs.values()])}
        self.layers.append(0)

    def _end(self, *_: object) -> None:
        self._given = None

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._at:
            self._at.add(storage.data_ptr())
            self._storages[id(storage)] = storage
            self.every += storage.nbytes()
            if self._given is not None and storage.data_ptr() not in self._given:
                self.layers[-1] += storage.nbytes()
        return tensor


@pytest.mark.parametrize(
    ("make", "run", "layers"), [(llama, speak, 3), (gpt2, speak, 3), (t5, speak, 4), (resnet, look, 2)]
)
def test_it_is_what_a_real_forward_saves(make: Any, run: Any, layers: int) -> None:
    model = make()
    found = forward_saves(model, context=CONTEXT, batch=BATCH)
    seen = Seen(model, run)
    assert found is not None
    assert found.counted
    assert [layer.saved_nbytes for layer in found.layers] == seen.layers
    assert len(seen.layers) == layers
    assert found.every_nbytes == seen.every > found.layers_nbytes == sum(seen.layers) > 0
    assert all(layer.peak_nbytes >= layer.saved_nbytes for layer in found.layers)


def test_documents_that_positions_keep_apart_take_a_mask_in_each_layer() -> None:
    model = llama()
    plain, packed = (forward_saves(model, context=CONTEXT, batch=BATCH, packed=packed) for packed in (False, True))
    seen = Seen(model, speak_of_several)
    assert plain is not None
    assert packed is not None
    assert [layer.saved_nbytes for layer in packed.layers] == seen.layers
    assert packed.every_nbytes == seen.every
    mask = BATCH * CONTEXT * CONTEXT * 2
    assert all(a.saved_nbytes >= b.saved_nbytes + mask for a, b in zip(packed.layers, plain.layers, strict=True))


def test_of_a_module_of_ones_own() -> None:
    model = UNet()
    found = count_saved(without_bytes(model), lambda fake: restore(fake, 0), on_cpu=True)
    assert found.every_nbytes == Seen(model, lambda real: restore(real, 0)).every > 0
    assert "counted" in found.told()


def test_tokens_and_attention_count_and_layers_are_alike() -> None:
    model = llama(num_hidden_layers=2)
    training, random, drawn = model.training, torch.get_rng_state(), rng.getstate()
    one, two = (forward_saves(model, context=CONTEXT, batch=batch) for batch in (1, 2))
    assert one is not None
    assert two is not None
    assert two.layers_nbytes == 2 * one.layers_nbytes
    assert len({layer.saved_nbytes for layer in one.layers}) == 1
    assert one.largest_nbytes == one.layers_nbytes // 2
    assert one.movable_nbytes("auto") == one.layers_nbytes < one.every_nbytes == one.movable_nbytes("offload")
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random)
    assert drawn == rng.getstate()
    assert not any(parameter.untyped_storage().nbytes() == 0 for parameter in model.parameters())


class Layer(nn.Module):
    """Saves what is told, and holds something large meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.detach().repeat(10, 1)
        x = x + wide.sum() * 0
        del wide
        return torch.tanh(x * self.weight)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(Layer()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.sum()


def test_the_peak_of_a_layer_is_what_it_holds_while_it_runs() -> None:
    row = 256 * 4
    found = count_saved(without_bytes(Two()), lambda fake: fake(torch.ones(1, 256)), on_cpu=True)
    assert [layer.path for layer in found.layers] == ["layers.0", "layers.1"]
    assert [layer.saved_nbytes for layer in found.layers] == [2 * row, 2 * row]  # x before the product, the result
    assert all(10 * row < layer.peak_nbytes <= 11 * row + 64 for layer in found.layers)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x[: int(x.argmax().item())].sum()


def test_a_forward_that_asks_for_values_is_not_counted() -> None:
    with pytest.raises(NotCountedError, match="the forward of Asks cannot run on tensors without bytes"):
        count_saved(without_bytes(Asks()), lambda fake: fake(torch.ones(4, 4)), on_cpu=True)


def test_then_it_is_estimated_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()

    def asking(self: Any, **_: Any) -> Any:
        return self.norm.weight.argmax().item()

    monkeypatch.setattr(transformers.LlamaModel, "forward", asking)
    found = forward_saves(model, context=CONTEXT, batch=BATCH)
    assert found is not None
    assert not found.counted
    assert found.layers_nbytes == BATCH * CONTEXT * 3 * (14 * 64 + 4 * 96) * 2
    assert "an estimate from their widths: it cannot be counted, for the forward of LlamaForCausalLM" in found.told()
    assert forward_saves(llama(), context=None, batch=None) is None
    assert forward_saves(nn.Linear(2, 2), context=4, batch=1) is None


def test_a_sentence_says_what_was_counted() -> None:
    found = ForwardSaves(layers_nbytes=0, every_nbytes=2**20)
    assert found.told() == "a forward saves 1.00 MiB (counted), none of it in layers that could run again"
