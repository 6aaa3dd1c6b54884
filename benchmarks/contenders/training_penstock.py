"""penstock under the cap: what is left of it beside libraries and activations is the budget. As "committing" it makes
every step durable."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # loading imports it late; what it takes is nobody's to plan

import penstock
from penstock.memory.capacity import process_memory

from .training import LENGTH, Job, measure_steps, run_worker, started

# Imported for their time and memory: penstock gets the rest of itself, and torch's and transformers', on first use.
assert transformers
assert penstock.prepare

MIB = 2**20


def penstock_worker(job: Job) -> dict[str, Any]:
    """penstock under the cap."""
    now = process_memory()
    taken = now.anonymous_nbytes + now.file_nbytes  # libraries are charged to the group as well
    started()
    tokens = job.batch * LENGTH
    config = json.loads((Path(job.checkpoint) / "config.json").read_text())
    # of a layer that runs again, of the logits and their gradients, of the layers' inputs
    transient = tokens * (34 * 2 * config["hidden_size"] + 14 * config["vocab_size"])
    transient += tokens * 2 * config["hidden_size"] * config["num_hidden_layers"]
    host = job.cap_nbytes - taken - transient - 72 * MIB
    model, optimizer = penstock.prepare(
        job.checkpoint,
        optimizer=penstock.AdamW(lr=1e-5, max_grad_norm=job.clip),
        disk=job.run,
        max_memory={"host": host},
        device="cpu",
        activations="auto",
        context=LENGTH,
        batch=job.batch,
        updates="backward" if job.clip is None else "step",
    )
    commits: list[Any] = []

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if job.way == "committing":
            commits.append(penstock.save(model, optimizer))

    def settle() -> None:
        optimizer.training.finish()
        for commit in commits:
            commit.wait()

    found = measure_steps(
        job,
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        lambda loss: loss.backward(),
        update,
        settle,
    )
    plan = model.penstock.plan
    found |= {"host_nbytes": host, "streamed_nbytes": sum(b.nbytes for b in plan.blocks if b.home == "disk")}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["threads"] = torch.get_num_threads()
    penstock.close(model)
    return found


if __name__ == "__main__":
    run_worker(penstock_worker)
