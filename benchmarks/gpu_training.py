"""Fine-tune a 7B-shaped model on a GPU that could not hold its optimizer: tokens per second, and how busy the GPU is.

    python -m benchmarks.gpu_training                                  # about nine minutes; JSON goes to $OUT, if set
    python -m benchmarks.gpu_training --contenders resident,penstock-cpu,penstock-device
    python -m benchmarks.gpu_training --try-out                        # the harness itself, on an emulated device

Llama's shape: 32 layers (fewer where host memory holds less, and the table says so), 4096 wide, random weights in bf16,
AdamW with an fp32 master, layers made again in backward, 8 x 2048 tokens per step. penstock has 16 GiB of the device
for weights; activations come on top, as for all. Every contender runs in a process of its own, and what one of them
fails of is a row, too. The resident run holds everything on the device, where it fits: the time of its forward and
backward, over that of a step, is the share of a step in which a GPU that computes the same is busy.

The room that a run's store takes on its drive, twice 12 bytes per parameter, is left untaken here, since no commit is
made: a machine's drive may be smaller than its memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .gpu_training_runs import Setting, task_of

GIB = 2**30
CHECKOUT = Path(__file__).parents[1]
BUSY_GOAL = 0.90
TOTAL_S = 560.0
"""After this long nothing is started any more, and what runs is ended: the whole stays below ten minutes."""
LEAST_S = 45.0
"""What a contender needs at least to be worth starting."""


CONTENDERS: dict[str, str] = {
    "resident": "plain PyTorch, all on the device",
    "penstock": "penstock, states in host memory",
    "penstock-clip": "penstock, the same with max_grad_norm",
    "torch-fsdp": "torch: fully_shard, CPUOffloadPolicy, fused AdamW",
    "penstock-disk": "penstock, 30 % of the states on disk",
    "deepspeed": "DeepSpeed ZeRO-3, optimizer and weights in host memory",
    "penstock-cpu": "penstock, updates on the CPU alone",
    "penstock-device": "penstock, updates on the device alone",
}
USUAL = ("resident", "penstock", "penstock-clip", "torch-fsdp", "penstock-disk", "deepspeed")


def in_process(name: str, setting: Setting, timeout_s: float) -> dict[str, Any]:
    """Run one task in a process of its own; what it reports, or how it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu_training", "--task", name, "--setting", json.dumps(vars(setting))]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=output, stderr=complaints, text=True)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.seek(0)
        complaints.seek(0)
        said, complained = output.read().splitlines(), complaints.read()
    took = time.monotonic() - started
    for line in reversed(said):
        if line.startswith('{"'):
            return {**json.loads(line), "process_s": took}
    lines = [line.strip() for line in complained.splitlines() if line.strip()]
    ended = f"ended ({process.returncode}) after {took:.0f} s"
    return {"failure": f"{ended}: {lines[-1] if lines else 'no message'}", "stderr": complained[-4000:]}


def render(results: dict[str, dict[str, Any]], setting: Setting) -> Table:
    """The comparison, one row per contender."""
    tokens = setting.batch * setting.length
    made = Table(
        title=f"{setting.parameters / 1e9:.2f} B parameters, {setting.layers} layers, {tokens} tokens per step"
    )
    for column in ("contender", "s/step", "tokens/s", "GPU busy", "peak device", "ready after", "first loss"):
        made.add_column(column)
    first = results.get("resident", {}).get("losses", [None])[0]
    for name, result in results.items():
        if "failure" in result:
            made.add_row(CONTENDERS[name], result["failure"])
            continue
        loaded = result.get("loaded_s")
        busy = busy_of(result, results)
        made.add_row(
            CONTENDERS[name],
            f"{result['step_s']:.3f}",
            f"{tokens / result['step_s']:.0f}",
            "" if busy is None else f"{busy:.1%}",
            f"{result['peak_allocated_nbytes'] / GIB:.1f} GiB",
            "" if loaded is None else f"{loaded:.0f} s",
            "equal" if result["losses"][0] == first else f"{result['losses'][0]:.6f}",
        )
    return made


def busy_of(result: dict[str, Any], results: dict[str, dict[str, Any]]) -> float | None:
    """The share of a step in which a GPU that computes the same is at work."""
    compute = results.get("resident", {}).get("compute_s")
    return None if compute is None else float(min(1.0, compute / result["step_s"]))


def make_setting(arguments: argparse.Namespace) -> Setting:
    """How many layers host memory holds, and the budgets."""
    from penstock.memory.capacity import host_capacity

    if arguments.try_out:
        small = Setting(
            scratch="", device="cpu", penstock_device="emulated:h2d=2GiB/s,d2h=2GiB/s", layers=4, hidden=256,
            batch=2, length=64, device_budget_nbytes=4 * 2**20, host_budget_nbytes=0,
        )  # fmt: skip
        return replace(small, host_budget_nbytes=17 * small.parameters + 2**28)
    available = host_capacity().available_nbytes
    setting = Setting(
        scratch="", device="cuda", penstock_device="cuda", layers=arguments.layers, hidden=4096,
        batch=arguments.batch, length=2048, device_budget_nbytes=16 * GIB, host_budget_nbytes=0,
    )  # fmt: skip
    while setting.layers > 2 and 16.2 * setting.parameters + 12 * GIB > available:
        setting = replace(setting, layers=setting.layers - 1)
    return replace(setting, host_budget_nbytes=min(available - 8 * GIB, int(16.2 * setting.parameters) + 4 * GIB))


def run_all(
    names: list[str], setting: Setting, started: float, console: Console, file: Path | None
) -> dict[str, dict[str, Any]]:
    """Every contender, as long as there is time; what is known is written after each."""
    results: dict[str, dict[str, Any]] = {}
    content: dict[str, Any] = {"setting": vars(setting), "parameters": setting.parameters, "results": results}
    if not setting.penstock_device.startswith("emulated"):
        console.print("calibrating ...", highlight=False)
        content["calibration"] = in_process("calibrate", setting, 150)
    for name in names:
        left = TOTAL_S - (time.monotonic() - started)
        if left < LEAST_S:
            results[name] = {"failure": "no time left"}
            continue
        console.print(f"{CONTENDERS[name]} ...", highlight=False)
        with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
            results[name] = in_process(name, replace(setting, scratch=folder), left)
        if "failure" not in results[name]:
            results[name]["gpu_busy"] = busy_of(results[name], results)
        if file is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
    return results


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--contenders", default=",".join(USUAL), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--layers", type=int, default=32, help="at most (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 2048 tokens (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=None, help="where runs lie meanwhile (default: a temporary folder)")
    parser.add_argument("--try-out", action="store_true", help="try the harness on an emulated device")
    parser.add_argument("--json", type=Path, default=None, help="default: $OUT/gpu_training.json, if OUT is set")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.contenders.split(",")) - CONTENDERS.keys()
    if unknown:
        parser.error(f"no contender is called {', '.join(sorted(unknown))}: there are {', '.join(CONTENDERS)}")
    return arguments


def main() -> None:
    """Command line; exit code 1 when penstock failed, 4 when the goal was missed."""
    started = time.monotonic()
    arguments = parse_arguments()
    if arguments.task:
        print(json.dumps(task_of(arguments.task)(Setting(**json.loads(arguments.setting)), arguments.task)), flush=True)
        os._exit(0)  # as for closing: the system gives memory back faster
    import torch

    if not arguments.try_out and not torch.cuda.is_available():
        sys.exit(f"error: torch {torch.__version__} sees no CUDA device; --try-out tries the harness without one")
    out = os.environ.get("OUT")
    file = arguments.json or (Path(out) / "gpu_training.json" if out else None)
    names = [name for name in arguments.contenders.split(",") if not (arguments.try_out and name == "torch-fsdp")]
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        setting = replace(make_setting(arguments), scratch=scratch)
        results = run_all(names, setting, started, Console(stderr=True), file)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(render(results, setting))
    ours = results.get("penstock", {})
    if "failure" in ours:
        sys.exit(1)
    busy = ours.get("gpu_busy")
    if busy is not None and not arguments.try_out:
        verdict = "reached" if busy >= BUSY_GOAL else "missed"
        console.print(f"GPU busy with states in host memory: {busy:.1%} (goal ≥ {BUSY_GOAL:.0%}: {verdict})")
        sys.exit(0 if busy >= BUSY_GOAL else 4)


if __name__ == "__main__":
    main()
