"""A few published rows from end to end; the benchmark of the same name predicts all of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.published import compare, markdown, printed

T4 = {"gpu": "NVIDIA T4", "gpus": 1, "gpu_mem_GB": 16, "dram_GB": 208}
V100 = {"gpu": "V100-SXM3-32GB (DGX-2)", "gpus": 1, "gpu_mem_GB": 32, "dram_GB": 1500}
A100 = {
    "gpu": "A100-80GB (Azure NC96ads_A100_v4)",
    "gpus": 1,
    "gpu_mem_GB": 80,
    "ssd": "1/2/4 NVMe, 3.25 GB/s each, RAID-0 EXT4",
    "ssd_count": 2,
}
OPT = {"name": "OPT-30B", "layers": 48, "hidden": 7168, "heads": 56, "ffn": 28672, "vocab": 50272, "precision": "fp16"}
LLAMA = {
    **{"name": "Llama3-70B", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
    **{"vocab": 128256, "precision": "bf16"},
}
ROWS = (
    ("FlexGen", T4, OPT, {"prompt": 512, "gen": 32, "effective_batch": 144}, 7.32),
    ("FlexGen (4-bit compression)", T4, OPT, {"prompt": 1024, "gen": 32}, 3.98),
    ("DeepSpeed ZeRO-Inference", T4, OPT, {"prompt": 512, "gen": 32, "effective_batch": 4, "lowest_tier": "cpu"}, 0.6),
    ("ZeRO-Inference", {**V100, "gpus": 2}, OPT, {"prompt": 4, "gen": 10, "batch": 256, "tier": "nvme"}, 51),
    ("ZeRO-Inference NVMe, GDS", A100, LLAMA, {"prompt": 512, "gen": 32, "batch": 96, "tier": "nvme"}, 4.05),
)


def row(system: str, hardware: Any, model: Any, workload: Any, value: float) -> dict[str, Any]:
    return {
        **{"id": system, "system": system, "hardware": hardware, "model": model, "workload": workload},
        **{"metric": "generation throughput", "unit": "tokens/s", "value": value, "kind": "validation"},
    }


@pytest.mark.parametrize("figures", ROWS, ids=lambda figures: figures[0])
def test_predictions_are_near(figures: tuple[Any, ...]) -> None:
    assert abs(compare(row(*figures)).error) < 0.2


def test_figures_with_few_digits_are_met_where_they_are_printed_alike() -> None:
    assert printed(0.0052, 0.01) == 0.01
    assert printed(0.0048, 0.01) == 0.0
    assert printed(17.6, 18) == 18
    assert printed(1.94, 2.0) == 1.9


def test_the_tables() -> None:
    lines = markdown([compare(row(*figures)) for figures in ROWS]).splitlines()
    assert lines[0].startswith("5 rows: median error")
    assert sum(line.startswith("| ZeRO-Inference |") for line in lines) == 2
