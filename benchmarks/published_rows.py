"""Rows of published figures as what the simulator takes: a machine, a model, a workload.

A row says which GPU, how much memory, which drives. What a data sheet adds is taken from the machine of that kind that
is shipped with penstock. Where a row leaves out a setting that its authors published elsewhere, that is in `COMMANDS`.
Nothing here comes from the figures that are predicted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.hardware import load
from penstock.memory.errors import UsageError
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware
from penstock.scheduler.modelconfig import published_shape
from penstock.scheduler.modelshape import ModelShape
from penstock.scheduler.systems.prediction import Prediction
from penstock.scheduler.work import Work

Row = Mapping[str, Any]

GIB = 2**30

_MACHINES = {
    "NVIDIA T4": "t4-gcp",
    "V100-SXM3-32GB (DGX-2)": "v100-dgx2",
    "A100-80GB (Azure NC96ads_A100_v4)": "a100-80gb-azure",
    "H200 (Azure ND-H200-v5)": "h200-azure",
    "RTX 4090": "rtx4090-12ssd",
}

_NVME: dict[tuple[str, int], tuple[float, float, float]] = {
    # GiB/s: read into host memory, read into the GPU's (GDS), written. Calibration rows deepnvme-001 to -045;
    # DeepSpeed's own tools count in GiB (csrc/aio/py_test/test_ds_aio_utils.py: BYTES_PER_GB = 1024**3).
    ("1/2/4 NVMe, 3.25 GB/s each, RAID-0 EXT4", 1): (2.9, 3.2, 1.3),
    ("1/2/4 NVMe, 3.25 GB/s each, RAID-0 EXT4", 2): (5.6, 5.7, 2.6),
    ("1/2/4 NVMe, 3.25 GB/s each, RAID-0 EXT4", 4): (10.1, 9.6, 5.3),
    ("4 x Gen4", 1): (9.6, 9.6, 5.0),
    ("4 x Gen5", 1): (26.5, 26.5, 11.0),
    ("8 x Gen5", 1): (48.0, 48.0, 26.0),
}

COMMANDS: dict[tuple[str, str, int], dict[str, Any]] = {
    # FlexLLMGen at 004ffef: benchmark/flexllmgen/bench_suite.py, bench_*_4x1.sh, bench_*_1x4.sh, benchmark/hf_ds.
    ("FlexGen", "OPT-6.7B", 512): {"percent": [100, 0, 100, 0, 100, 0], "gpu_batch": 2},
    ("FlexGen", "OPT-6.7B", 1024): {"percent": [100, 0, 100, 0, 100, 0], "gpu_batch": 1},
    ("FlexGen", "OPT-30B", 512): {
        "percent": [20, 80, 0, 100, 0, 100],
        "gpu_batch": 48,
        "batches": 3,
        "cpu_attention": True,
    },
    ("FlexGen", "OPT-30B", 1024): {
        "percent": [4, 96, 0, 100, 0, 100],
        "gpu_batch": 20,
        "batches": 4,
        "cpu_attention": True,
    },
    ("FlexGen", "OPT-175B", 512): {
        "percent": [0, 50, 0, 0, 0, 100],
        "gpu_batch": 32,
        "batches": 8,
        "cpu_attention": True,
        "pin_weight": False,
    },
    ("FlexGen", "OPT-175B", 1024): {
        "percent": [0, 50, 0, 0, 0, 100],
        "gpu_batch": 12,
        "batches": 12,
        "cpu_attention": True,
        "pin_weight": False,
    },
    ("FlexGen(c)", "OPT-6.7B", 512): {
        "percent": [100, 0, 100, 0, 100, 0],
        "gpu_batch": 72,
        "compress_weight": True,
        "compress_cache": True,
    },
    ("FlexGen(c)", "OPT-6.7B", 1024): {
        "percent": [100, 0, 100, 0, 100, 0],
        "gpu_batch": 28,
        "compress_weight": True,
        "compress_cache": True,
    },
    # OPT-30B is run with --compress-cache alone: its weights fit the host as they are.
    ("FlexGen(c)", "OPT-30B", 512): {
        "percent": [0, 100, 0, 100, 0, 100],
        "gpu_batch": 64,
        "batches": 8,
        "compress_cache": True,
    },
    ("FlexGen(c)", "OPT-30B", 1024): {
        "percent": [0, 100, 0, 100, 0, 100],
        "gpu_batch": 20,
        "batches": 12,
        "compress_cache": True,
    },
    ("FlexGen(c)", "OPT-175B", 512): {
        "percent": [0, 100, 0, 100, 0, 100],
        "gpu_batch": 48,
        "batches": 3,
        "pin_weight": False,
        "compress_weight": True,
        "compress_cache": True,
    },
    ("FlexGen(c)", "OPT-175B", 1024): {
        "percent": [0, 100, 0, 100, 0, 100],
        "gpu_batch": 12,
        "batches": 4,
        "pin_weight": False,
        "compress_weight": True,
        "compress_cache": True,
    },
    ("FlexGen(4)", "OPT-6.7B", 512): {"percent": [100, 0, 100, 0, 100, 0], "gpu_batch": 24},
    ("FlexGen(4)", "OPT-30B", 512): {
        "percent": [20, 80, 0, 100, 0, 100],
        "gpu_batch": 64,
        "batches": 3,
        "inner": 4,
        "cpu_attention": True,
    },
    ("FlexGen(4)", "OPT-175B", 512): {
        "percent": [0, 100, 0, 100, 0, 100],
        "gpu_batch": 40,
        "inner": 4,
        "pin_weight": False,
        "cpu_attention": True,
    },
}

_BATCHES: dict[tuple[str, str, int], int] = {
    # The same repository: benchmark/hf_ds/bench_hf.py and bench_ds_*_4x1.sh.
    ("Accelerate", "OPT-6.7B", 1024): 1,
    ("Accelerate", "OPT-175B", 1024): 1,
    ("DeepSpeed(4)", "OPT-6.7B", 512): 48,
    ("DeepSpeed(4)", "OPT-30B", 512): 24,
    ("DeepSpeed(4)", "OPT-175B", 512): 4,
}

_TIERS = {
    # Likewise: the lowest tier that each baseline uses.
    ("Accelerate", "OPT-6.7B"): "gpu",
    ("Accelerate", "OPT-30B"): "cpu",
    ("Accelerate", "OPT-175B"): "disk",
    ("DeepSpeed ZeRO-Inference", "OPT-6.7B"): "cpu",
    ("DeepSpeed ZeRO-Inference", "OPT-30B"): "cpu",
    ("DeepSpeed ZeRO-Inference", "OPT-175B"): "nvme",
    ("DeepSpeed(4)", "OPT-6.7B"): "gpu",
    ("DeepSpeed(4)", "OPT-30B"): "cpu",
    ("DeepSpeed(4)", "OPT-175B"): "cpu",
}

_SLOW_COPIES = (
    "copies from pageable memory are taken at 5.95 GB/s, measured on another machine; this one, with cores at 2 GHz, "
    "must have reached about 4.6"
)
_T4_MEMORY = (
    "decode reads weights at 0.69 of the memory's data sheet, as gpt-fast does on an A100; the T4 must have reached 0.8"
)
_RELAY = (
    "each stage's weights pass through pinned memory at the pageable rate of 5.95 GB/s; the row needs 8.4 or more, and "
    "no calibration row gives the relay's rate"
)
_GATHERS = (
    "all-gathers follow copies on one stream, as DGX-2's figures show; between machines they seem to overlap. The "
    "network is not in the row: 100 Gbit/s is assumed"
)
_UNEXPLAINED = (
    "80 s per step, for a quarter of 350 GB from each host and the rest over the network: at the rates of the OPT-30B "
    "row it would be 22 s. Not explained by the schedule; weights may have been on disk"
)
_NO_LENGTHS = "the row says neither how long prompts nor answers are: 512 + 32, as elsewhere in the post, are assumed"

REASONS: dict[str, str] = {
    "flexgen-002": _SLOW_COPIES,
    "flexgen-017": _SLOW_COPIES,
    "flexgen-030": _T4_MEMORY,
    "flexgen-033": _T4_MEMORY,
    "flexgen-036": _T4_MEMORY,
    "flexgen-035": _RELAY,
    "flexgen-038": _RELAY,
    "flexgen-040": _GATHERS,
    "flexgen-043": _GATHERS,
    "flexgen-041": _UNEXPLAINED,
    "flexgen-044": _UNEXPLAINED,
    "deepnvme-045": "3.0 s per step are predicted and 3.7 published: at this rate what Python takes per parameter "
    "(here 560 of them) is no longer hidden, and no calibration row gives it",
    "deepnvme-046": _NO_LENGTHS,
    "deepnvme-047": _NO_LENGTHS,
}
"""Of rows whose prediction is off by more than 20 %: why, as far as can be said."""

BY_CONSTRUCTION = ("deepspeed-005", "deepspeed-007", "deepspeed-008", "deepspeed-019", "deepspeed-010", "deepspeed-022")
"""Rows that say the two figures from which calibration rows deepspeed-037 and -039 were worked out."""


def machine_of(row: Row) -> Hardware:
    """The machine of a row."""
    said = row["hardware"]
    if said["gpu"] not in _MACHINES:
        raise UsageError(f"{row['id']}: no machine with {said['gpu']} is known here: add it to _MACHINES")
    base = load(_MACHINES[said["gpu"]])
    assert base.gpu is not None, "all of these have one"
    gpus = int(said.get("gpus", 1))
    apart = "machines" in str(said.get("note", ""))
    host_nbytes = round(said["dram_GB"] * 1e9) if "dram_GB" in said else base.host_nbytes
    return msgspec.structs.replace(
        base,
        gpu=msgspec.structs.replace(base.gpu, memory_nbytes=round(said["gpu_mem_GB"] * 1e9)),
        gpus=1 if apart else gpus,
        machines=gpus if apart else 1,
        host_nbytes=host_nbytes,
        cpu=msgspec.structs.replace(base.cpu, memory_nbytes=host_nbytes),
        drives=_drives(said, base),
    )


def _drives(said: Row, base: Hardware) -> tuple[Drive, ...]:
    measured = _NVME.get((str(said.get("ssd")), int(said.get("ssd_count", 1))))
    if measured is None:
        return base.drives  # of the very machine: the shipped figures are its data sheet's
    host, direct, written = (rate * GIB for rate in measured)
    found = Drive(
        name=str(said["ssd"]), read=Curve.flat(host), write=Curve.flat(written), read_direct=Curve.flat(direct)
    )
    return (found,)


def model_of(row: Row) -> ModelShape:
    """The model of a row."""
    return published_shape(row["model"])


def work_of(row: Row) -> tuple[str, Work]:
    """Which system, and what it is asked for."""
    said, name = row["workload"], str(row["system"])
    model = str(row["model"]["name"])
    if name.startswith("LoHan"):
        return "lohan", Work(kind="finetune", batch=said["batch"], context=said["seq"])
    prompt, generate = int(said.get("prompt", 512)), int(said.get("gen", 32))
    batch = said.get("batch") or said.get("effective_batch") or _BATCHES.get((name, model, prompt))
    stated = said_policy(str(said.get("policy", "")))
    batch = batch or stated.get("gpu_batch", 1) * stated.get("batches", 1)
    system, policy = _policy(name, model, prompt, said)
    work = Work(
        kind="batch", prompt=prompt, generate=generate, batch=int(batch), context=prompt + generate, policy=policy
    )
    return system, work


def _policy(name: str, model: str, prompt: int, said: Row) -> tuple[str, dict[str, Any]]:
    if name == "Accelerate":
        return "accelerate", {"device_map": said.get("lowest_tier") or _TIERS[name, model]}
    if name.startswith("FlexGen"):
        short = {"FlexGen (4-bit compression)": "FlexGen(c)", "FlexGen(1)": "FlexGen"}.get(name, name)
        return "flexgen", {**COMMANDS.get((short, model, prompt), {}), **said_policy(str(said.get("policy", "")))}
    if name.startswith("SGLang"):
        return "sglang-zero", {"io": "gds" if "GDS" in name else "aio"}
    if name.startswith("DeepSpeed"):
        return "zero-inference", {"tier": _TIERS[name, model], "revision": "2022"}
    policy: dict[str, Any] = {"tier": said["tier"], "prefetch": said.get("prefetch", True)}
    policy["io"] = "gds" if "GDS" in name else "aio"
    policy["revision"] = "2022" if name == "ZeRO-Inference" else "2024"
    if "resident_Bparams" in said:
        policy["resident_parameters"] = said["resident_Bparams"] * 1e9
    return "zero-inference", policy


def said_policy(text: str) -> dict[str, Any]:
    """What a row says of FlexGen's settings: micro-batches as 48 x 3, six percentages, and flags."""
    found: dict[str, Any] = {}
    if batches := re.search(r"(\d+) x (\d+)", text):
        found["gpu_batch"], found["batches"] = int(batches[1]), int(batches[2])
    if percent := re.search(r"(?:\d+[, ]){5}\d+", text):
        found["percent"] = [int(each) for each in re.split(r"[, ]", percent[0])]
    if "cpu attention" in text:
        found["cpu_attention"] = True
    if "pin-weight 0" in text:
        found["pin_weight"] = False
    return found


def figure_of(row: Row, prediction: Prediction) -> float:
    """What of a prediction the row's figure is."""
    if row["unit"] == "TFLOPS":
        return prediction.tflops or 0.0
    if str(row["metric"]).startswith("decoding"):
        return prediction.decode_tokens_per_s
    return prediction.tokens_per_s
