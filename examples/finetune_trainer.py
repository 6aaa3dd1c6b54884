"""Let transformers' Trainer drive a model that streams.

python examples/finetune_trainer.py          (needs: pip install accelerate)

The Trainer is given the streamed optimizer, and told not to clip (`max_grad_norm=0`): penstock does, by its own option.
It is told to save nothing, either: `penstock.save` makes a commit of the states that lie on disk already.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import penstock

STEPS = 6
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def main() -> None:
    """Train on pieces of this file, whose bytes are the tokens."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    rows = [{"input_ids": piece, "labels": piece} for piece in TEXT.split(64)[:-1]]
    with tempfile.TemporaryDirectory(dir=".") as here:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(Path(here) / "checkpoint")
        model, optimizer = penstock.prepare(
            Path(here) / "checkpoint",
            optimizer=penstock.AdamW(lr=1e-3, max_grad_norm=1.0),
            disk=Path(here) / "run",
            max_memory={"host": "48MiB"},
            device="cpu",
        )
        arguments = TrainingArguments(
            output_dir=str(Path(here) / "trainer"),
            per_device_train_batch_size=2,
            max_steps=STEPS,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        trainer.train()
        commit = penstock.save(model, optimizer, scheduler=schedule)
        commit.wait()
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        print(f"loss {losses[0]} -> {losses[-1]} in {trainer.state.global_step} steps; commit {commit.number} is there")
        penstock.close(model)


if __name__ == "__main__":
    main()
