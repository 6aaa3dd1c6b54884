"""Train a checkpoint that may be larger than memory on texts, in a loop of one's own.

python examples/finetune.py CHECKPOINT 8GiB RUN notes.txt

`penstock finetune` is the same as a command, with commits, metrics, evaluation and a curve. Run this again to go on.
"""

import os
import sys

import torch
from transformers import AutoTokenizer

import penstock

SEQ, STEPS, COMMIT_EVERY = 256, 100, 20


def main(checkpoint: str, budget: str, run: str, text: str) -> None:
    """Begin a run or go on with it, take the steps that are left, and commit every so often."""
    with open(text, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(checkpoint)(file.read(), return_tensors="pt")["input_ids"][0]
    memory = {"host": budget}
    if os.path.exists(run):
        model, optimizer = penstock.resume(run, max_memory=memory)
    else:
        adamw = penstock.AdamW(lr=1e-5, max_grad_norm=1.0, groups={"*norm*": {"weight_decay": 0.0}})
        model, optimizer = penstock.prepare(checkpoint, optimizer=adamw, max_memory=memory, disk=run)
    begin = 0 if optimizer.extra is None else optimizer.extra["step"]
    try:
        print(penstock.explain(model), file=sys.stderr)
        model.train()
        for step in range(begin, STEPS):
            drawn = torch.Generator().manual_seed(step)  # so that a run that goes on sees what it would have seen
            at = int(torch.randint(len(ids) - SEQ, (1,), generator=drawn))
            batch = ids[None, at : at + SEQ].to(model.device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.4f}", file=sys.stderr)
            if (step + 1) % COMMIT_EVERY == 0:
                penstock.save(model, optimizer, extra={"step": step + 1})
        penstock.save(model, optimizer, extra={"step": STEPS}).wait()
    finally:
        penstock.close(model)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
