"""Continue a prompt with a checkpoint that is larger than memory.

python examples/run_checkpoint.py CKPT "The sea" --max-memory host=8GiB
"""

import argparse

from transformers import AutoTokenizer, TextStreamer

import penstock


def main() -> None:
    """Load, tell the plan, generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a folder or a Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-memory", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    inputs = tokenizer(options.prompt, return_tensors="pt")
    model = penstock.load(options.checkpoint, max_memory=options.max_memory)
    try:
        print(penstock.explain(model))
        model.generate(
            **inputs.to(model.device),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
    finally:
        penstock.close(model)


if __name__ == "__main__":
    main()
