"""Small models in training, each with habits of its own. `CASES`, by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR
from training_reference import Case
from zoo import token_ids
from zoo.decoders import COMMON, llama_config
from zoo.entry import Outputs

import penstock

VOCAB = 128
TEXT: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 32}


def language(model: Any, batch: int) -> Tensor:
    """Next tokens of random text."""
    ids = token_ids(seed=batch, batch=2, length=10, vocab=VOCAB)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def few_tokens(model: Any, batch: int) -> Tensor:
    """So few that not every expert gets one."""
    ids = token_ids(seed=batch, batch=1, length=3, vocab=VOCAB)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def look(model: Any) -> Outputs:
    """Evaluation between steps, as a training loop does it."""
    model.eval()
    seen = {"loss": language(model, 1000)}
    model.train()
    return seen


def talk(model: Any) -> Outputs:
    """Evaluation, and a few tokens."""
    model.eval()
    ids = token_ids(seed=1001, batch=1, length=4, vocab=VOCAB)
    made = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    model.train()
    return {**look(model), "tokens": made}


def _llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(num_hidden_layers=3, **TEXT, **changes))


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **COMMON))


def _mixtral() -> nn.Module:
    sizes: dict[str, Any] = {
        **{"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, **sizes, **COMMON))


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    tokens: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, **sizes, **tokens, dropout_rate=0.1)
    )


class UNet(nn.Module):
    """Down and up again, with norms of two kinds, one of which changes buffers, and weights that lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.head = nn.Conv2d(16, 3, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        deep = self.middle(self.down(functional.max_pool2d(x, 2)))
        out: Tensor = self.head(self.merge(torch.cat((self.up(deep), x), dim=1)))
        return out


def _pictures(batch: int) -> Tensor:
    made = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    return made.to(memory_format=torch.channels_last)


def restore(model: Any, batch: int) -> Tensor:
    """A picture from itself."""
    x = _pictures(batch)
    return functional.mse_loss(model(x), x)


def look_at_pictures(model: Any) -> Outputs:
    """Evaluation with running statistics."""
    model.eval()
    seen = {"loss": restore(model, 1000)}
    model.train()
    return seen


class Perceptron(nn.Module):
    """Layers of which some are frozen, one is never used, one only at times, and one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(32, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(4))
        self.spare = nn.Linear(96, 96)
        self.sometimes = nn.Linear(96, 96)
        self.outputs = nn.Linear(96, 8)
        self.layers[1].requires_grad_(False)
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x: Tensor, also: bool) -> Tensor:
        x = torch.tanh(self.inputs(x))
        for layer in (*self.layers, self.layers[0]):
            x = x + torch.tanh(layer(x))
        if also:
            x = x + self.sometimes(x)
        out: Tensor = self.outputs(x)
        return out


def _vectors(model: Any, batch: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(batch)).to(dtype)


def squares(model: Any, batch: int) -> Tensor:
    """Small outputs."""
    out: Tensor = model(_vectors(model, batch), also=batch % 3 == 1)
    return out.square().mean()


def sums(model: Any, batch: int) -> Tensor:
    """Outputs that sum to one; another loss, on other data."""
    out: Tensor = model(_vectors(model, batch + 500), also=False)
    return (out.sum(dim=-1) - 1).abs().mean()


def warmup(optimizer: Any) -> Any:
    """Four steps up, then slowly down."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / 4, 4 / (step + 1)))


def cosine(optimizer: Any) -> Any:
    """Down, each rate worked out from the one before."""
    return CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)


def drops(optimizer: Any) -> Any:
    """Down at once, twice."""
    return MultiStepLR(optimizer, milestones=[3, 6], gamma=0.3)


_ALL = (
    Case(
        name="llama",
        make=_llama,
        losses=(language,),
        optimizer=penstock.AdamW(
            lr=5e-3, weight_decay=0.1, max_grad_norm=0.5, groups={"*norm*": {"weight_decay": 0.0}}
        ),
        dtype=torch.bfloat16,
        batches=3,
        schedule=cosine,
        between=talk,
    ),
    Case(
        name="tied",
        make=lambda: _llama(tie_word_embeddings=True),
        losses=(language,),
        optimizer=penstock.AdamW(lr=5e-3),
        dtype=torch.bfloat16,
        steps=20,
    ),
    Case(
        name="gpt2",
        make=_gpt2,
        losses=(language,),
        optimizer=penstock.AdamW(
            lr=5e-3, betas=(0.8, 0.95), eps=1e-6, max_grad_norm=1.0, groups={"*.bias": {"lr": 1e-3}}
        ),
        schedule=warmup,
        between=look,
    ),
    Case(
        name="mixtral",
        make=_mixtral,
        losses=(few_tokens,),
        optimizer=penstock.AdamW(lr=5e-3, max_grad_norm=0.3),
        dtype=torch.bfloat16,
    ),
    Case(
        name="t5",
        make=_t5,
        losses=(language,),
        optimizer=penstock.AdamW(lr=2e-3, max_grad_norm=1.0),
        dtype=torch.bfloat16,
        schedule=drops,
    ),
    Case(
        name="u-net",
        make=UNet,
        losses=(restore,),
        optimizer=penstock.AdamW(lr=5e-3, max_grad_norm=0.2),
        batches=3,
        between=look_at_pictures,
    ),
    Case(
        name="perceptron",
        make=Perceptron,
        losses=(squares, sums),
        optimizer=penstock.SGD(lr=5e-2, momentum=0.9, dampening=0.1, weight_decay=0.01, max_grad_norm=0.5),
        dtype=torch.bfloat16,
        schedule=drops,
    ),
    Case(
        name="perceptron-nesterov",
        make=Perceptron,
        losses=(squares,),
        optimizer=penstock.SGD(lr=5e-2, momentum=0.9, nesterov=True, groups={"layers.*": {"lr": 1e-2}}),
    ),
    Case(
        name="perceptron-lion",
        make=Perceptron,
        losses=(squares, sums),
        optimizer=penstock.Lion(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, groups={"*bias": {"weight_decay": 0.0}}),
        batches=2,
        schedule=cosine,
    ),
)

CASES = {case.name: case for case in _ALL}
