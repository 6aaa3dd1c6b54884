"""Runs the prompts of a throughput job: `python -m benchmarks.contenders.many_run WAY …`.

penstock: `generate_many` under whatever budget the cgroup leaves. single: penstock's `generate`, one prompt after
another. accelerate: its disk offload, in batches. resident: plain transformers, in the same batches, without a cap.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # loading imports it late; imports do not count
from transformers import AutoModelForCausalLM

import penstock
from penstock.api import load as load_streamed
from penstock.cli.prompts import ManyRequest
from penstock.cli.request import Sampling
from penstock.cli.sharing import load_for
from penstock.runtime.throughput import Completions
from penstock.runtime.throughput_choice import Sampling as Drawn
from penstock.runtime.throughput_start import Asked, Limits, start

from .accelerate_run import CPU_SHARE_OF_CAP
from .many import ManyClock, ManyJob, parse_many

assert transformers  # imported for its time


def penstock_many(job: ManyJob, clock: ManyClock) -> None:
    """What `penstock run --prompts` does, without files."""
    request = ManyRequest(
        checkpoint=str(job.checkpoint), file=Path("-"), output=None, resume=False, force=False, chat=False,
        max_new_tokens=job.new_tokens, sampling=Sampling(temperature=None, top_p=None, top_k=None, seed=None),
        max_memory="auto", device="cpu", disk=None, dtype="auto", trust_remote_code=False, as_json=False,
    )  # fmt: skip
    asked = [
        Asked(index=index, ids=tuple(ids), new_tokens=job.new_tokens, name=f"prompt {index}")
        for index, ids in enumerate(job.prompts())
    ]
    loaded = load_for(request, str(job.checkpoint), asked)
    clock.loaded()
    work = start(loaded.model, asked, Drawn(), limits=Limits(), choice=loaded.choice, products=loaded.products)
    with Completions(work, ordered=False, decode=None) as completions:
        tokens = sum(len(done.ids) for done in completions)
        reached = completions.statistics()
    choice = reached.schedule
    rows = max(len(batch.indices) for batch in choice.batches)
    notes = f"{len(choice.batches)} micro-batches of up to {rows}, {choice.lanes} at once\n"
    notes += str(penstock.explain(loaded.model))
    clock.report(tokens, sweeps=reached.sweeps, sequences_nbytes=choice.nbytes, rows=rows, notes=notes)
    penstock.close(loaded.model)


def in_batches(job: ManyJob, clock: ManyClock, model: Any, *, notes: str = "") -> None:
    """Transformers' own `generate`, one batch after another."""
    clock.loaded()
    tokens = sweeps = 0
    for ids, mask in job.batches():
        given = torch.tensor(ids)
        output = model.generate(
            input_ids=given,
            attention_mask=torch.tensor(mask),
            max_new_tokens=job.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens += (output.shape[1] - given.shape[1]) * len(ids)
        sweeps += job.new_tokens
    clock.report(tokens, sweeps=sweeps, rows=job.batch, notes=notes)


def main() -> None:
    """Run the job on the command line, in the way that its first argument names."""
    clock = ManyClock()
    way = sys.argv.pop(1)
    job = parse_many()
    if way == "penstock":
        penstock_many(job, clock)
    elif way == "single":
        model = load_streamed(job.checkpoint, max_memory="auto", device="cpu", context=256, batch=job.batch)
        in_batches(job, clock, model, notes=str(penstock.explain(model)))
        penstock.close(model)
    elif way == "accelerate":
        model = AutoModelForCausalLM.from_pretrained(
            job.checkpoint,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": int(CPU_SHARE_OF_CAP * job.cap_nbytes)},
            offload_folder=str(job.scratch),
        )
        in_batches(job, clock, model)
    elif way == "resident":
        in_batches(job, clock, AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype="auto"))
    else:
        sys.exit(f"error: unknown way {way!r}")


if __name__ == "__main__":
    main()
