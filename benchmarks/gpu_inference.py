"""Decode a model larger than a GPU's budget with penstock and with accelerate, in one run, against the link's bound.

    python -m benchmarks.gpu_inference --json result.json      # writes the reference checkpoint first: 5.4 GB
    python -m benchmarks.gpu_inference --try-out               # the harness itself, on 18 MB and without a GPU

Every contender runs in a process of its own. The rate of host → device copies from pinned memory is measured in the
same run, before the first contender and after the last; the better of the two makes the bound.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .raw_disk import best_read_rate
from .reference_checkpoint import SHAPES, default_folder, ensure_reference

GIB = 2**30
CHECKOUT = Path(__file__).parents[1]
PROMPT_LENGTH = 32
FIRST_PROMPT_ID = 300
WARM_TOKENS = 2
"""The prompt, and the token during which the order is learned, are not steady."""
GOAL = 1.05
TOTAL_S = 460.0
"""After this long the contenders that are left are not started: the whole run stays below eight minutes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every process is told."""

    checkpoint: str
    scratch: str
    device: str
    """Of torch, for the contenders that know nothing of emulation."""
    penstock_device: str
    device_budget_nbytes: int
    host_budget_nbytes: int
    """With weights on disk; with weights in host memory it is as large as they are."""
    weights_nbytes: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run the checkpoint."""

    name: str
    title: str
    new_tokens: int
    """Slow contenders make fewer; tokens are compared as far as both went."""
    reads_disk: bool = False


CONTENDERS = (
    Contender(name="resident", title="transformers, resident", new_tokens=24),
    Contender(name="penstock-host", title="penstock, weights in pinned host memory", new_tokens=24),
    Contender(name="penstock-disk", title="penstock, weights on disk", new_tokens=10, reads_disk=True),
    Contender(name="accelerate-cpu", title="accelerate cpu_offload", new_tokens=6),
    Contender(name="accelerate-disk", title="accelerate disk_offload", new_tokens=5, reads_disk=True),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a contender reported. Seconds since it began to load, bytes."""

    loaded_s: float
    token_s: list[float]
    tokens: list[int]
    peak_allocated_nbytes: int
    """Device memory in torch tensors at most; everything counts: weights, KV, activations."""
    peak_reserved_nbytes: int
    versions: dict[str, str]
    link_nbytes: int = 0
    """Host → device bytes per token, as planned; penstock only."""
    disk_nbytes: int = 0
    """Bytes read from disk per token, as planned; penstock only."""
    plan: str = ""

    @property
    def s_per_token(self) -> float:
        """Mean over the steady tokens."""
        stamps = self.token_s[WARM_TOKENS - 1 :]
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


# --- in the contenders' processes -----------------------------------------------------------------------------------


class _Clock:
    """Stamps tokens. Speaks the streamer protocol of `generate`, which hands over tokens that are on the host."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stamps: list[float] = []

    def put(self, value: object) -> None:
        self.stamps.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass


def run_contender(name: str, new_tokens: int, setting: Setting) -> dict[str, Any]:
    """Load, generate greedily, and say how it went."""
    import torch
    import transformers

    clock = _Clock()
    model = LOADERS[name](setting)
    loaded_s = time.perf_counter() - clock.start
    ids = torch.arange(FIRST_PROMPT_ID, FIRST_PROMPT_ID + PROMPT_LENGTH, device=setting.device)[None] * 7
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
    on_gpu = setting.device.startswith("cuda")
    report: dict[str, Any] = {
        "loaded_s": loaded_s,
        "token_s": clock.stamps[1:],  # the first call brings the prompt
        "tokens": out[0, PROMPT_LENGTH:].tolist(),
        "peak_allocated_nbytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "peak_reserved_nbytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if name.startswith("penstock"):
        import penstock

        plan = model.penstock.plan
        report |= {"link_nbytes": plan.link_nbytes_per_sweep, "disk_nbytes": plan.disk_nbytes_per_sweep}
        report["plan"] = str(penstock.explain(model))
        penstock.close(model)
    return report


def _resident(setting: Setting) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype="auto").to(setting.device).eval()


def _penstock_host(setting: Setting) -> Any:
    return _penstock(setting, setting.weights_nbytes + setting.weights_nbytes // 4)


def _penstock_disk(setting: Setting) -> Any:
    return _penstock(setting, setting.host_budget_nbytes)


def _penstock(setting: Setting, host_nbytes: int) -> Any:
    import penstock

    budget = {"device": setting.device_budget_nbytes, "host": host_nbytes}
    return penstock.load(setting.checkpoint, max_memory=budget, device=setting.penstock_device)


def _accelerate_cpu(setting: Setting) -> Any:
    import accelerate
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype="auto").eval()
    return accelerate.cpu_offload(model, execution_device=setting.device)


def _accelerate_disk(setting: Setting) -> Any:
    import accelerate
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype="auto").eval()
    return accelerate.disk_offload(model, setting.scratch, execution_device=setting.device)


LOADERS: dict[str, Callable[[Setting], Any]] = {
    "resident": _resident,
    "penstock-host": _penstock_host,
    "penstock-disk": _penstock_disk,
    "accelerate-cpu": _accelerate_cpu,
    "accelerate-disk": _accelerate_disk,
}


def measure_link(setting: Setting) -> dict[str, Any]:
    """Bytes per second of host → device copies from pinned memory: the best of several, of 64 MiB and more."""
    import torch

    if not setting.device.startswith("cuda"):
        return {"nbytes_per_s": 4.0 * GIB, "gpu": "none (emulated)"}
    best = 0.0
    for mib in (64, 256, 1024):
        source = torch.empty(mib * 2**20, dtype=torch.uint8, pin_memory=True).fill_(1)
        target = torch.empty_like(source, device=setting.device)
        for _ in range(8):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            target.copy_(source, non_blocking=True)
            after.record()
            after.synchronize()
            best = max(best, source.nbytes / (before.elapsed_time(after) / 1e3))
    return {"nbytes_per_s": best, "gpu": torch.cuda.get_device_name(0)}


# --- in the harness -------------------------------------------------------------------------------------------------


def in_process(task: str, new_tokens: int, setting: Setting, timeout_s: float) -> dict[str, Any]:
    """Run one task in a process of its own; RuntimeError says how it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu_inference", "--task", task, "--new-tokens", str(new_tokens)]
    command += ["--setting", json.dumps(vars(setting))]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result after {timeout_s:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of this machine, in bytes per second, as measured in this run."""

    h2d: float
    disk: float


def bound_s(contender: Contender, result: Result, setting: Setting, rates: Rates) -> float:
    """Seconds per token that the links need for what must be moved.

    penstock: what its plan moves. The others: all that a device budget of the same size could not keep.
    """
    if contender.name == "resident":
        return 0.0
    rest = max(0, setting.weights_nbytes - setting.device_budget_nbytes)
    disk = result.disk_nbytes if result.plan else rest if contender.reads_disk else 0
    return max((result.link_nbytes or rest) / rates.h2d, disk / rates.disk)


def render(results: dict[str, Result | str], setting: Setting, rates: Rates, gpu: str) -> Table:
    """The comparison, one row per contender."""
    table = Table(title=f"{gpu}: h2d {rates.h2d / GIB:.1f} GiB/s, disk {rates.disk / GIB:.2f} GiB/s")
    for column in ("contender", "s/token", "bound", "distance", "tokens equal", "load", "peak device"):
        table.add_column(column)
    yardstick = results.get("resident")
    for contender in CONTENDERS:
        result = results.get(contender.name, "not run")
        if isinstance(result, str):
            table.add_row(contender.title, result)
            continue
        bound = bound_s(contender, result, setting, rates)
        table.add_row(
            contender.title,
            f"{result.s_per_token:.4f}",
            f"{bound:.4f}" if bound else "",
            f"{result.s_per_token / bound:.3f}" if bound else "",
            equal_tokens(result, yardstick),
            f"{result.loaded_s:.1f} s",
            f"{result.peak_reserved_nbytes / GIB:.2f} GiB",
        )
    return table


def equal_tokens(result: Result, yardstick: Result | str | None) -> str:
    """Whether two runs agree as far as both went."""
    if not isinstance(yardstick, Result):
        return "unknown"
    pairs = list(zip(result.tokens, yardstick.tokens, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return "yes" if same == len(pairs) else f"first {same} of {len(pairs)}"


def run_all(setting: Setting, started: float, console: Console) -> tuple[dict[str, Result | str], Rates, str]:
    """Measure the links, run every contender, measure the links again."""
    files = sorted(Path(setting.checkpoint).glob("*.safetensors"))
    link = in_process("link", 0, setting, 120)
    disk = best_read_rate(files).nbytes_per_s
    results: dict[str, Result | str] = {}
    for contender in CONTENDERS:
        left = TOTAL_S - (time.monotonic() - started)
        if left < 20:
            results[contender.name] = "no time left"
            continue
        console.print(f"{contender.title} ...", highlight=False)
        with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
            try:
                found = in_process(contender.name, contender.new_tokens, replace(setting, scratch=folder), left)
                results[contender.name] = Result(**found)
            except RuntimeError as error:
                results[contender.name] = f"failed: {error}"
    h2d = max(link["nbytes_per_s"], in_process("link", 0, setting, 120)["nbytes_per_s"])
    return results, Rates(h2d=h2d, disk=max(disk, best_read_rate(files).nbytes_per_s)), link["gpu"]


def make_setting(arguments: argparse.Namespace) -> Setting:
    """Write the checkpoint if need be, and decide the budgets. OSError where the disk is too small."""
    shape = SHAPES["tiny" if arguments.try_out else "reference"]
    folder = (arguments.dir or default_folder()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = ensure_reference(folder, shape, with_gguf=False)
    weights = sum(file.stat().st_size for file in paths.safetensors)
    return Setting(
        checkpoint=str(paths.checkpoint),
        scratch=str(folder),
        device="cpu" if arguments.try_out else "cuda",
        penstock_device="emulated:h2d=4GiB/s" if arguments.try_out else "cuda",
        device_budget_nbytes=weights // 2 if arguments.try_out else 2 * GIB,
        host_budget_nbytes=weights // 2 if arguments.try_out else GIB,
        weights_nbytes=weights,
    )


def write_json(file: Path, setting: Setting, results: dict[str, Result | str], rates: Rates, gpu: str) -> None:
    """Everything measured and derived; sizes in bytes, times in seconds."""
    rows: dict[str, object] = {}
    for contender in CONTENDERS:
        result = results.get(contender.name, "not run")
        if isinstance(result, str):
            rows[contender.name] = {"failure": result}
            continue
        bound = bound_s(contender, result, setting, rates)
        figures = {"s_per_token": result.s_per_token, "bound_s": bound, "goal": GOAL}
        figures["distance"] = result.s_per_token / bound if bound else 0.0
        rows[contender.name] = {**vars(result), **figures, "equal": equal_tokens(result, results.get("resident"))}
    content = {"gpu": gpu, "setting": vars(setting), "rates_nbytes_per_s": vars(rates), "contenders": rows}
    file.write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dir", type=Path, default=None, help="where the checkpoint lies or is made (default: cache)")
    parser.add_argument("--try-out", action="store_true", help="try the harness on an emulated device")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def main() -> None:
    """Command line; exit code 1 when a contender failed, 4 when the goal was missed."""
    started = time.monotonic()
    arguments = parse_arguments()
    if arguments.task:
        setting = Setting(**json.loads(arguments.setting))
        link = arguments.task == "link"
        report = measure_link(setting) if link else run_contender(arguments.task, arguments.new_tokens, setting)
        print(json.dumps(report), flush=True)
        return
    import torch

    if not arguments.try_out and not torch.cuda.is_available():
        sys.exit(f"error: torch {torch.__version__} sees no CUDA device; --try-out tries the harness without one")
    try:
        setting = make_setting(arguments)
        results, rates, gpu = run_all(setting, started, Console(stderr=True))
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    Console(width=None if sys.stdout.isatty() else 160).print(render(results, setting, rates, gpu))
    if arguments.json:
        write_json(arguments.json, setting, results, rates, gpu)
    main_result = results["penstock-host"]
    if any(isinstance(result, str) for result in results.values()) or isinstance(main_result, str):
        sys.exit(1)
    distance = main_result.s_per_token / bound_s(CONTENDERS[1], main_result, setting, rates)
    print(f"penstock, weights in pinned host memory: {distance:.3f} × bytes/B_h2d; goal ≤ {GOAL}")
    sys.exit(0 if distance <= GOAL or arguments.try_out else 4)


if __name__ == "__main__":
    main()
