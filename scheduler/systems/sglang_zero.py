"""SGLang with weights offloaded by ZeRO-Inference: SGLang's kernels and batching, DeepSpeed's way of fetching.

Source: DeepNVMe's blog post of 2025-06. Weights come as in ZeRO-Inference (2024 and later); attention is a fused
kernel, which reads the cache once. SGLang's benchmarks count the tokens of prompts and answers together; so does this.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import msgspec

from ..hardware import Hardware
from ..modelshape import ModelShape
from ..work import Work
from .prediction import Prediction
from .system import Options, options
from .zero_inference import Tier, ZeroInference


class SglangOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where weights are."""

    tier: Tier = "nvme"
    io: Literal["aio", "gds"] = "aio"
    gpus: int = 0


class SglangZero:
    """The policy."""

    name = "sglang-zero"
    summary = "SGLang on weights that ZeRO-Inference fetches; counts the tokens of prompts too"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        chosen = options(work, SglangOptions, self.name)
        asked = replace(work, policy=msgspec.to_builtins(chosen))
        found = ZeroInference(name=self.name, eager=False).predict(hardware, model, asked)
        every = (work.prompt + work.generate) / work.generate
        return msgspec.structs.replace(
            found,
            tokens_per_s=found.tokens_per_s * every,
            notes=(*found.notes, "tokens of prompts are counted with those of answers"),
        )
