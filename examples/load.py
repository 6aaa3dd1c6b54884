"""Generate with a checkpoint that may be larger than memory.

python examples/load.py CHECKPOINT 3GiB "Once upon a time"
"""

import sys

from transformers import AutoTokenizer

import penstock


def main(checkpoint: str, budget: str, prompt: str) -> None:
    """Load under a budget, show the plan, generate, show what it took."""
    model = penstock.load(checkpoint, max_memory={"host": budget}, device="cpu")
    try:
        print(penstock.explain(model), file=sys.stderr)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
        totals = model.penstock.statistics()
        print(f"read {totals.disk_read_nbytes / 2**30:.2f} GiB, waited {totals.waited_s:.1f} s", file=sys.stderr)
    finally:
        penstock.close(model)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
