"""Yardstick: everything resident. Its time per token is the machine's t_compute; it leaves the routing of the text."""

import os

import torch
import transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe  # from_pretrained imports it late; imports do not count
from transformers import AutoModelForCausalLM

from penstock.runtime.experts.recording import RoutingRecorder

from .moe import MoeJob, parse_moe_job, run_text, timed_text
from .protocol import TokenClock


def record(job: MoeJob, model: torch.nn.Module) -> None:
    """Write the routing of the text: in a second pass, as looking on takes time."""
    unfinished = job.scratch / "routing"
    with RoutingRecorder(model, unfinished, source=f"{job.checkpoint.name}, words of seed {job.seed}") as recorder:
        recorder.sequences(1)
        run_text(job, model)
    os.replace(unfinished, job.trace)  # scratch is on the checkpoint's disk


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_moe_job()
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype="auto")
    tokens = timed_text(job, clock, model)
    if not job.trace.exists():
        record(job, model)
    clock.report(tokens, {"transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
