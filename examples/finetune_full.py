"""Train all weights of a small model that streams, stop in the middle, go on, and see that nothing has changed.

python examples/finetune_full.py

The model is made here, so nothing is fetched. `finetune.py` is that loop for a checkpoint and a text of yours.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import penstock

BUDGET = {"host": "48MiB"}
STEPS, STOP = 6, 4
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def write_checkpoint(folder: Path) -> None:
    """A Llama of less than a million parameters whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def batch(step: int) -> torch.Tensor:
    """Two pieces of this file, [2, 64]; a run that goes on sees what it would have seen."""
    starts = torch.randint(len(TEXT) - 64, (2,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[start : start + 64] for start in starts.tolist()])


def train(model: Any, optimizer: Any, steps: range) -> list[float]:
    """The loop of any training."""
    losses = []
    model.train()
    for step in steps:
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(checkpoint: Path, folder: Path, stop: int | None) -> list[float]:
    """All steps; where `stop` says so, in two processes' worth."""
    adamw = penstock.AdamW(lr=1e-3, max_grad_norm=1.0, groups={"*norm*": {"weight_decay": 0.0}})
    model, optimizer = penstock.prepare(checkpoint, optimizer=adamw, disk=folder, max_memory=BUDGET, device="cpu")
    print(penstock.explain(model), file=sys.stderr)
    losses = train(model, optimizer, range(stop or STEPS))
    penstock.save(model, optimizer).wait()
    penstock.close(model)
    if stop is not None:
        model, optimizer = penstock.resume(folder, max_memory=BUDGET, device="cpu")
        losses += train(model, optimizer, range(stop, STEPS))
        penstock.save(model, optimizer).wait()
        penstock.close(model)
    return losses


def main() -> None:
    """Once in one go, once in two."""
    with tempfile.TemporaryDirectory(dir=".") as here:
        write_checkpoint(Path(here) / "checkpoint")
        whole = run(Path(here) / "checkpoint", Path(here) / "whole", None)
        broken = run(Path(here) / "checkpoint", Path(here) / "broken", STOP)
    print(f"loss {whole[0]:.3f} -> {whole[-1]:.3f}; the same when interrupted: {whole == broken}")


if __name__ == "__main__":
    main()
