"""Yardstick: plain PyTorch, everything resident. Its time per step is the machine's t_compute, plus a plain update."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .training import Job, measure_steps, run_worker, started


def resident_worker(job: Job) -> dict[str, Any]:
    """Plain PyTorch: masters in fp32, updated by torch.optim.AdamW."""
    started()
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16)
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-5)

    def update() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        if job.clip is not None:
            torch.nn.utils.clip_grad_norm_(masters, job.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)

    found = measure_steps(
        job,
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        lambda loss: loss.backward(),
        update,
        lambda: None,
    )
    found["parameters"] = sum(parameter.numel() for parameter in parameters)
    return found


if __name__ == "__main__":
    run_worker(resident_worker)
