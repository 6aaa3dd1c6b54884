"""Yardstick: plain transformers, everything resident. Its time per token is the machine's t_compute."""

import torch
import transformers
import transformers.models.llama.modeling_llama  # from_pretrained imports it late; imports do not count
from transformers import AutoModelForCausalLM

from .protocol import TokenClock, parse_job, run_transformers


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_job()
    tokens = run_transformers(job, clock, lambda: AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype="auto"))
    clock.report(tokens, {"transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
