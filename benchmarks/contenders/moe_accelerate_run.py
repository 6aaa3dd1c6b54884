"""accelerate's disk offload, as its documentation has it: layers that the CPU's share cannot hold stream from disk."""

import collections
import os

import accelerate
import torch
import transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe  # from_pretrained imports it late; imports do not count
from transformers import AutoModelForCausalLM

from .accelerate_run import CPU_SHARE_OF_CAP
from .moe import parse_moe_job, timed_text
from .protocol import TokenClock


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_moe_job()
    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": int(CPU_SHARE_OF_CAP * job.cap_nbytes)},
        offload_folder=str(job.scratch),
    )
    os.sync()  # it has written what it streams from now on: the drive is not to do both while tokens are timed
    device_map = getattr(model, "hf_device_map", {"": "cpu"})  # absent where everything fits
    homes = collections.Counter(str(home) for home in device_map.values())
    tokens = timed_text(job, clock, model)
    versions = {
        "accelerate": accelerate.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    clock.report(tokens, versions, notes=f"modules by home: {dict(homes)}")


if __name__ == "__main__":
    main()
