"""Mapped files: the weights are views of the checkpoint, and the kernel's page cache is the cache of experts.

That is what llama.cpp does with a GGUF, done with torch's products: what reading on page faults costs, whoever
multiplies.
"""

from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM

from .moe import parse_moe_job, timed_text
from .protocol import TokenClock

NAME = "mapped"
"""Of the experts function."""


class Mapped:
    """All tensors of a checkpoint, as views of the files."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._homes = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118, it is no dict

    def tensor(self, name: str) -> torch.Tensor:
        """A view: nothing is read before it is used."""
        return self._homes[name].get_tensor(name)


def experts_forward(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, H] The experts of the tokens, one after another, from the file."""
    summed = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        rows, places = torch.where(chosen == expert)
        gate, up, down = module.mapped[expert]
        state = hidden[rows]
        state = functional.linear(functional.silu(functional.linear(state, gate)) * functional.linear(state, up), down)
        summed.index_add_(0, rows, (state * weights[rows, places, None]).to(summed.dtype))
    return summed


def load(folder: Path) -> Qwen3MoeForCausalLM:
    """A model whose parameters are views of the checkpoint's files."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    files = Mapped(folder)
    config = AutoConfig.from_pretrained(folder, experts_implementation=NAME)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # it has buffers, which no file has
    for path, module in model.named_modules():
        if isinstance(module, Qwen3MoeExperts):
            names = ("gate_proj", "up_proj", "down_proj")
            module.mapped = [  # type: ignore[assignment]
                tuple(files.tensor(f"{path}.{expert}.{name}.weight") for name in names)
                for expert in range(config.num_experts)
            ]
            module._parameters.clear()
        for name in [name for name, value in module._parameters.items() if value is not None]:
            value = torch.nn.Parameter(files.tensor(f"{path}.{name}"), requires_grad=False)
            module._parameters[name] = value
    return model


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_moe_job()
    tokens = timed_text(job, clock, load(job.checkpoint))
    versions = {
        "safetensors": safetensors.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    clock.report(tokens, versions)


if __name__ == "__main__":
    main()
