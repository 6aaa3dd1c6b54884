"""A text through a mixture of experts, a token at a time: what every contender of that benchmark does.

All are given the same words, whatever they would have said themselves: a random model soon repeats itself, and then
uses the same few experts again and again.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..moe_checkpoint import SHAPES, words
from .protocol import Job, TokenClock


@dataclass(frozen=True, kw_only=True)
class MoeJob(Job):
    """One run: a prompt at once, then so many tokens one by one. The batch is 1."""

    shape: str
    """Of the checkpoint."""
    seed: int
    """Of the text."""
    trace: Path
    """Where the resident model leaves the routing of the text, unless it is there already."""

    def text(self) -> list[int]:
        """The prompt, and what follows it: each step is given one and says what it would have come to next."""
        return words(SHAPES[self.shape], self.prompt_length + self.new_tokens - 1, seed=self.seed)


def parse_moe_job() -> MoeJob:
    """The job on this process's command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("checkpoint", "gguf", "scratch", "trace"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("cap-nbytes", "batch", "prompt-length", "new-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shape", required=True)
    return MoeJob(**vars(parser.parse_args()))


def run_text(job: MoeJob, model: Any, on_step: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Feed the text to a transformers model; what it would have said after the prompt and after each token.

    Args:
        job: Has the text.
        model: A causal language model.
        on_step: Called after each step.
    """
    import torch  # not every contender is to pay for it

    text = torch.tensor([job.text()])
    pieces = [text[:, : job.prompt_length], *text[:, job.prompt_length :].split(1, dim=1)]
    cache = None
    said = []
    with torch.no_grad():
        for ids in pieces:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            said.append(int(output.logits[0, -1].argmax()))
            on_step()
    return [said]


def timed_text(job: MoeJob, clock: TokenClock, model: Any) -> list[list[int]]:
    """The same with the clock: the model is ready now."""
    clock.mark_loaded()
    return run_text(job, model, clock.mark_token)
