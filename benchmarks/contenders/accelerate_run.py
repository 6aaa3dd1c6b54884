"""accelerate's disk offload, as its documentation has it: what does not fit into the CPU's share streams from disk."""

import collections

import accelerate
import torch
import transformers
import transformers.models.llama.modeling_llama  # from_pretrained imports it late; imports do not count
from transformers import AutoModelForCausalLM, PreTrainedModel

from .protocol import TokenClock, parse_job, run_transformers

CPU_SHARE_OF_CAP = 0.5
"""1536 MiB of a cap of 3 GiB: the rest is interpreter, torch, one layer in flight, and page cache."""


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_job()
    homes: collections.Counter[str] = collections.Counter()

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            job.checkpoint,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": int(CPU_SHARE_OF_CAP * job.cap_nbytes)},
            offload_folder=str(job.scratch),
        )
        device_map = getattr(model, "hf_device_map", {"": "cpu"})  # absent where everything fits
        homes.update(str(home) for home in device_map.values())
        return model

    tokens = run_transformers(job, clock, load)
    versions = {
        "accelerate": accelerate.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    clock.report(tokens, versions, notes=f"modules by home: {dict(homes)}")


if __name__ == "__main__":
    main()
