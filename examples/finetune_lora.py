"""Train adapters on a small model whose own weights are only read, and give them to PEFT.

python examples/finetune_lora.py          (needs: pip install peft)

The model is made here, so nothing is fetched. As a command: penstock finetune CKPT --data FILE --out RUN --lora r=16,
then penstock store export RUN OUT, which writes what is written here at the end.
"""

import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import penstock

STEPS = 8
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def write_checkpoint(folder: Path) -> None:
    """A Llama of less than a million parameters whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Train, save, and load what was saved with PEFT alone."""
    with tempfile.TemporaryDirectory(dir=".") as here:
        checkpoint, run, out = (Path(here) / name for name in ("checkpoint", "run", "adapters"))
        write_checkpoint(checkpoint)
        torch.manual_seed(0)  # what adapters begin with
        model, optimizer = penstock.prepare(
            checkpoint,
            lora=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            optimizer=penstock.AdamW(lr=2e-3, max_grad_norm=1.0),
            disk=run,
            max_memory={"host": "8MiB"},
            device="cpu",
        )
        print(penstock.explain(model), file=sys.stderr)
        model.train()
        ids = TEXT[:128].view(2, 64)
        for step in range(STEPS):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}")
        penstock.save(model, optimizer).wait()  # adapters, masters and states, in run/; penstock.resume goes on
        model.save_pretrained(out)
        model.eval()
        with torch.no_grad():
            said = model(input_ids=ids).logits
        print(f"{model.penstock.statistics().disk_written_nbytes / 2**20:.1f} MiB written in all")
        penstock.close(model)

        again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(checkpoint, dtype="auto"), out).eval()
        with torch.no_grad():
            print("the same answers in memory:", torch.equal(again(input_ids=ids).logits, said))


if __name__ == "__main__":
    main()
