"""What each contender of `benchmarks.gpu_training` does, in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WARM, STEPS = 2, 5
"""Steps that do not count, and all of them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every process is told."""

    scratch: str
    device: str
    """Of torch."""
    penstock_device: str
    layers: int
    hidden: int
    batch: int
    length: int
    device_budget_nbytes: int
    host_budget_nbytes: int
    """That holds all weights, gradients and states."""

    def config(self) -> dict[str, Any]:
        """Of the model."""
        return {
            "vocab_size": 32000 if self.hidden > 1024 else 1024,
            "hidden_size": self.hidden,
            "intermediate_size": 11008 * self.hidden // 4096,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(2, self.hidden // 128),
            "num_key_value_heads": max(2, self.hidden // 128),
            "max_position_embeddings": self.length,
            "use_cache": False,
        }

    @property
    def parameters(self) -> int:
        """How many the model has, but for its norms."""
        config = self.config()
        layer = 4 * self.hidden**2 + 3 * self.hidden * config["intermediate_size"]
        return int(self.layers * layer + 2 * self.hidden * config["vocab_size"])


def build(setting: Setting, dtype: Any) -> Any:
    """The model with the same weights each time, made where that is quick."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(LlamaConfig(**setting.config())).train()
    finally:
        torch.set_default_dtype(before)


def settle(setting: Setting) -> float:
    """When the device has done all."""
    import torch

    if setting.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    setting: Setting, model: Any, update: Callable[[], None], backward: Callable[[Any], None], *, waits: bool = False
) -> dict[str, Any]:
    """Seconds of each step, end to end; `waits`: and of forward and backward, for which the device is waited for."""
    import torch

    steps, computing, losses = [], [], []
    vocabulary = setting.config()["vocab_size"]
    start = settle(setting)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, vocabulary, (setting.batch, setting.length), generator=generator).to(setting.device)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        if waits:
            computing.append(settle(setting) - start)
        update()
        losses.append(float(loss.detach()))
        end = settle(setting) if waits or step == STEPS - 1 else time.perf_counter()
        steps.append(end - start)
        start = end
    on_gpu = setting.device.startswith("cuda")
    return {
        "step_s": statistics.mean(steps[WARM:]),
        "steps_s": steps,
        "compute_s": statistics.mean(computing[WARM:]) if waits else None,
        "losses": losses,
        "peak_allocated_nbytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "versions": {"torch": torch.__version__},
    }


def run_resident(setting: Setting, _: str) -> dict[str, Any]:
    """Weights, masters and states on the device."""
    import torch

    model = build(setting, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=setting.device.startswith("cuda"))

    def update() -> None:
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)

    return measure(setting, model, update, lambda loss: loss.backward(), waits=True)


def run_penstock(setting: Setting, name: str) -> dict[str, Any]:
    """`penstock.prepare` on the module, with the budgets of the setting."""
    import torch

    import penstock
    from penstock.memory.store.files import SystemFiles

    SystemFiles.allocate = lambda *_: None  # type: ignore[method-assign]  # see the docstring of this file
    start = time.perf_counter()
    host = setting.host_budget_nbytes
    if name.endswith("disk"):
        host -= int(0.3 * 12 * setting.parameters)
    clip = 1.0 if name.endswith("clip") else None
    where: Any = {"penstock-cpu": "cpu", "penstock-device": "device"}.get(name, "auto")
    model, optimizer = penstock.prepare(
        build(setting, torch.bfloat16).cpu(),
        optimizer=penstock.AdamW(lr=1e-5, max_grad_norm=clip),
        disk=os.path.join(setting.scratch, "run"),
        max_memory={"device": setting.device_budget_nbytes, "host": host},
        device=setting.penstock_device,
        activations="recompute",
        updates="step" if clip else "backward",
        update_on=where,
    )
    ready = time.perf_counter()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    found = measure(setting, model, update, lambda loss: loss.backward())
    before = time.perf_counter()
    optimizer.training.finish()
    statistics_ = model.penstock.statistics()
    found |= {
        "loaded_s": ready - start,
        "last_update_s": time.perf_counter() - before,
        "plan": str(penstock.explain(model)),
        "waited_s": statistics_.waited_s,
    }
    return found


def run_fsdp(setting: Setting, _: str) -> dict[str, Any]:
    """FSDP2 on one device, fp32 masters, gradients and states in host memory, AdamW on the CPU."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    store = dist.FileStore(os.path.join(setting.scratch, "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cuda", (1,))
    model = build(setting, torch.float32).cpu()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy(
            pin_memory=False
        ),  # torch's pinned allocator may double what it is asked for
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():  # buffers are not offloaded
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = None if buffer is None else buffer.to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    try:
        return measure(setting, model, update, lambda loss: loss.backward())
    finally:
        dist.destroy_process_group()


def run_deepspeed(setting: Setting, _: str) -> dict[str, Any]:
    """ZeRO-3 with CPU offload and its own CPU Adam, where it is installed."""
    import deepspeed
    import torch

    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29511")
    model = build(setting, torch.bfloat16).cpu()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = {
        "train_micro_batch_size_per_gpu": setting.batch,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
        },
    }
    engine, *_rest = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    found = measure(setting, engine, engine.step, engine.backward)
    return {**found, "versions": {**found["versions"], "deepspeed": deepspeed.__version__}}


def run_calibration(setting: Setting, _: str) -> dict[str, Any]:
    """What `update_on="auto"` decides by."""
    command = [sys.executable, "-m", "penstock", "calibrate", "--device", setting.penstock_device, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return {"returncode": done.returncode, "said": (done.stdout + done.stderr)[-4000:]}


def task_of(name: str) -> Callable[[Setting, str], dict[str, Any]]:
    """What a process does."""
    if name.startswith("penstock"):
        return run_penstock
    return {
        "resident": run_resident,
        "torch-fsdp": run_fsdp,
        "deepspeed": run_deepspeed,
        "calibrate": run_calibration,
    }[name]
