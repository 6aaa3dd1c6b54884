"""Adapters on small models: what PEFT and plain PyTorch make of them in memory, and the same streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from training_cases import CASES, TEXT, cosine, language, look
from training_reference import Case, Reference, Streamed, Trace, run, scheduled, smallest
from zoo import load_resident
from zoo.decoders import llama_config
from zoo.entry import Outputs

import penstock

SEED = 11
"""Of what adapters begin with."""


def llama(**changes: Any) -> nn.Module:
    """Three layers."""
    return transformers.LlamaForCausalLM(llama_config(num_hidden_layers=3, **{**TEXT, **changes}))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraCase:
    """One training of adapters."""

    case: Case
    """The model without them, and how it is trained."""
    config: Callable[[], peft.LoraConfig]
    """PEFT writes into it."""

    def checkpoint(self, folder: Path) -> Path:
        """The model, saved."""
        if not folder.exists():
            self.case.build().save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
        return folder

    def adapted(self, model: Any) -> Any:
        """A model in memory with new adapters."""
        torch.manual_seed(SEED)
        return peft.get_peft_model(model, self.config()).train()

    def reference(self, checkpoint: Path) -> Reference:
        """In memory, by PEFT."""
        return Reference(self.case, self.adapted(load_resident(checkpoint)))


class Saved(Streamed):
    """A streamed training whose states are looked at after a commit: until then they are in memory alone."""

    def state(self) -> Outputs:
        """As `Streamed`."""
        penstock.save(self.model, self.optimizer).wait()
        return super().state()


BFLOAT = LoraCase(
    case=Case(
        name="llama",
        make=llama,
        losses=(language,),
        optimizer=penstock.AdamW(
            lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, groups={"*lora_B*": {"weight_decay": 0.0}}
        ),
        dtype=torch.bfloat16,
        batches=2,
        steps=20,
        schedule=cosine,
    ),
    config=lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
)
"""The usual: a bf16 base, adapters in fp32, dropout, clipping, accumulation, a schedule."""
TIED = LoraCase(
    case=replace(
        BFLOAT.case,
        name="tied",
        make=lambda: llama(tie_word_embeddings=True),
        optimizer=penstock.AdamW(lr=1e-2),
        dtype=torch.float32,
        batches=1,
        steps=6,
        schedule=None,
        between=look,
    ),
    config=lambda: peft.LoraConfig(
        r=3,
        lora_alpha=4,
        use_rslora=True,
        init_lora_weights="gaussian",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        layers_to_transform=[0, 2],
        lora_bias=False,
    ),
)
"""A fp32 base with tied embeddings, settings that are not everybody's, evaluation between steps."""

WORDY = LoraCase(
    case=replace(BFLOAT.case, name="wordy", make=lambda: llama(vocab_size=2**14), steps=2, between=look),
    config=lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"]),
)
"""So many words that the embedding is worth looking up; it has an adapter of its own, and so has the output layer."""
GPT2 = LoraCase(
    case=replace(CASES["gpt2"], steps=3, schedule=None, between=None),
    config=lambda: peft.LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc"],
        exclude_modules=["transformer.h.0.mlp.c_fc"],
        fan_in_fan_out=True,
        lora_bias=True,
    ),
)
"""Weights that lie the other way round, and settings that the other cases have not."""
MIXTRAL = LoraCase(
    case=replace(CASES["mixtral"], steps=3, batches=1),
    config=lambda: peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights="orthogonal"
    ),
)
"""Experts, which transformers stacks on loading, beside adapters on attention."""


def prepared(lora: LoraCase, folder: Path, placement: str, **options: Any) -> Saved:
    """Fresh adapters on a checkpoint, at one of the placements."""
    checkpoint = lora.checkpoint(folder / "checkpoint")

    def place(memory: dict[str, int], device: str) -> Any:
        torch.manual_seed(SEED)
        return penstock.prepare(
            checkpoint,
            optimizer=lora.case.optimizer,
            disk=folder / "run",
            lora=lora.config(),
            max_memory=memory,
            device=device,
            accumulate=lora.case.accumulate,
            **options,
        )

    device, memory = smallest(place, placement)
    made = Saved(*place(memory, device))
    made.model.train()
    return made


def resumed(lora: LoraCase, folder: Path, placement: str, **options: Any) -> Saved:
    """A run that goes on. The random numbers are not what they were."""
    torch.manual_seed(99)

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.resume(
            folder / "run",
            max_memory=memory,
            device=device,
            accumulate=lora.case.accumulate,
            scheduler=None if lora.case.schedule is None else lambda made: scheduled(lora.case, made),
            **options,
        )

    device, memory = smallest(place, placement)
    made = Saved(*place(memory, device))
    made.model.train()
    return made


def train(lora: LoraCase, trainer: Reference | Streamed) -> tuple[Trace, Outputs]:
    """From beginning to end."""
    trace = Trace()
    torch.manual_seed(7)
    run(lora.case, trainer, scheduled(lora.case, trainer.optimizer), range(lora.case.steps), trace)
    return trace, trainer.state()
