"""The process that runs one contestant: imports, says that it is warm, waits, generates, reports.

Started by `contest`, which samples its memory from outside.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any, Final

import msgspec

from .contest import Job, Report

WARM: Final = "warm"


def main(job: Job) -> None:
    """Run the job and print the report, one line of JSON, on stdout."""
    import torch
    import transformers
    from transformers.utils import logging

    import penstock

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _warm_up(transformers, torch)
    load, explain, close = penstock.load, penstock.explain, penstock.close  # these import the rest of it
    print(WARM, flush=True)
    sys.stdin.readline()
    model: Any
    if job.budget is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype="auto")
        model.eval().requires_grad_(False)  # as penstock.load gives it; kernels depend on it in the last bit
    else:
        model = load(job.folder, max_memory=job.budget, device=job.device, batch=1)
    stamps: list[float] = []
    tokens = _generate(torch, model, job.prompt, job.new_tokens, stamps)
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    plan = "" if job.budget is None else str(explain(model))
    print(
        msgspec.json.encode(
            Report(tokens=tokens, s_per_token=sum(steps) / len(steps), best_s=min(steps), plan=plan)
        ).decode(),
        flush=True,
    )
    if job.budget is not None:
        close(model)


def _warm_up(transformers: Any, torch: Any) -> None:
    """Make what a first run imports and compiles part of the baseline."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=None,
    )
    _generate(torch, transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval(), [1, 2, 3], 2, [])


def _generate(torch: Any, model: Any, prompt: list[int], new_tokens: int, stamps: list[float]) -> list[int]:
    class Clock:
        """Stamps each token after the prompt."""

        seen = False

        def put(self, value: object) -> None:
            if self.seen:
                stamps.append(time.perf_counter())
            self.seen = True

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=Clock(),
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Job))
