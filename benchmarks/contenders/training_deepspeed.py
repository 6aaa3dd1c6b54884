"""DeepSpeed ZeRO-3 on the CPU, one process: optimizer states and gradients on the drive, bf16 weights in memory.

Its settings are those that it has when none are given ("deepspeed"), or smaller buffers ("deepspeed-tuned"). By itself
it updates up to 1e9 parameters at once, through four buffers of fp32 as long, and gathers gradients in a bucket of 5e8
elements: a model of 0.17e9 is held several times over. Weights are not offloaded to the drive: the pool of buffers that
this takes, five of 1e8 elements, is larger than the weights of S.
"""

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from .training import Job, measure_steps, run_worker, started

TUNED = {"sub_group_size": 20_000_000, "reduce_bucket_size": 10_000_000}
"""Elements: more than the largest layer of S, and than its largest parameter."""
SETTINGS: dict[str, dict[str, int]] = {"deepspeed": {}, "deepspeed-tuned": TUNED}


def config_of(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration: penstock's AdamW, and the arithmetic of the resident run."""
    return {
        "train_micro_batch_size_per_gpu": job.batch,
        "bf16": {"enabled": True},
        "gradient_clipping": job.clip or 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": job.run},
            **SETTINGS[job.way],
        },
    }


def deepspeed_worker(job: Job) -> dict[str, Any]:
    """The same checkpoint, batches and steps."""
    started()
    Path(job.run).mkdir()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # what its launcher would set
    torch.distributed.init_process_group("gloo", init_method=f"file://{job.run}/rendezvous", rank=0, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config_of(job))
    found = measure_steps(
        job,
        lambda ids: engine(input_ids=ids, labels=ids, use_cache=False).loss,
        engine.backward,
        engine.step,
        lambda: None,
    )
    torch.distributed.destroy_process_group()
    return found | {"parameters": parameters, "threads": torch.get_num_threads(), "version": deepspeed.__version__}


if __name__ == "__main__":
    run_worker(deepspeed_worker)
