"""Fine-tuning under a memory cap: seconds per step, memory and bytes moved, against the bound and the resident run.

    python -m benchmarks.training                            # S, without and with clipping; needs root for the cgroup
    python -m benchmarks.training --size M --cap 3GiB --batch 1 --json training.json

Random Llama-shaped models (vocabulary 8192, feed-forward 2.6875 x hidden, heads 64 wide): S = 12 x 1024 (0.17 B
parameters), M = 24 x 2048 (1.25 B), L = 32 x 2560 (2.6 B). AdamW with an fp32 master, bf16 weights. Each contender runs
in a process of its own, penstock in a cgroup with the cap, the resident run (plain PyTorch with the same arithmetic)
without one, where it fits. In the same run the parts of the bound are measured: the rate of the update and of the
checksum on all cores, and reading and writing the drive at once.

bound without clipping: max(compute + update + checksum, bytes / mixed rate)
bound with clipping:    backward + max(forward + update + checksum, bytes / mixed rate)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .cgroup import MemoryCgroup
from .inference import CHECKOUT, ProvidedMemory, _watch, drop_caches, parse_nbytes, require_privileges
from .reference_checkpoint import default_folder
from .scoreboard import GIB
from .streams import Figure, arguments_of, finish, table

SIZES = {"S": (12, 1024), "M": (24, 2048), "L": (32, 2560)}
CAPS = {"S": GIB, "M": 3 * GIB, "L": 4 * GIB}
LENGTH, SKIPPED = 256, 2
MIB = 2**20
WORKER = "--worker"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    way: str
    checkpoint: str
    run: str
    cap_nbytes: int
    batch: int
    clip: float | None
    steps: int


def shape(size: str) -> dict[str, Any]:
    """The config of a size."""
    layers, hidden = SIZES[size]
    return {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": round(2.6875 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "dtype": "bfloat16",
    }


def make(size: str, folder: Path) -> Path:
    """The checkpoint, made once, by a process of its own."""
    path = folder / f"training-{size}-v1"
    if not (path / "done").exists():
        code = (
            "import sys, json, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0);"
            "torch.set_default_dtype(torch.bfloat16);"
            "m = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]))); m.save_pretrained(sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", code, json.dumps(shape(size)), str(path)], check=True)
        (path / "done").touch()
    return path


def batch_of(job: Job, step: int) -> Any:
    """Token ids [batch, LENGTH], fixed by the number of the step."""
    import torch

    return torch.randint(0, 8192, (job.batch, LENGTH), generator=torch.Generator().manual_seed(step))


def moved() -> tuple[int, int]:
    """Bytes that this process has read from and written to drives."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def measure_steps(job: Job, forward: Any, backward: Any, update: Any, settle: Any) -> dict[str, Any]:
    """Run the steps; seconds of each phase, bytes of each step."""
    rows, losses = [], []
    for step in range(job.steps):
        ids = batch_of(job, step)
        io, start = moved(), time.perf_counter()
        loss = forward(ids)
        losses.append(float(loss.detach()))
        first = time.perf_counter()
        backward(loss)
        second = time.perf_counter()
        update()
        third = time.perf_counter()
        if step == job.steps - 1:
            settle()
        after, end = moved(), time.perf_counter()
        rows.append((end - start, first - start, second - first, third - second, after[0] - io[0], after[1] - io[1]))
    steady = rows[SKIPPED:]
    names = ("step_s", "forward_s", "backward_s", "update_s", "read_nbytes", "written_nbytes")
    found = {name: statistics.mean(row[i] for row in steady) for i, name in enumerate(names)}
    return {**found, "best_s": min(row[0] for row in steady[:-1] or steady), "losses": losses}


def penstock_worker(job: Job) -> dict[str, Any]:
    """penstock under the cap."""
    import torch
    import transformers

    import penstock
    from penstock.memory.capacity import process_memory

    assert transformers.LlamaForCausalLM  # imported when it is asked for: 0.1 GiB that is nobody's to plan
    now = process_memory()
    taken = now.anonymous_nbytes + now.file_nbytes  # libraries are charged to the group as well
    Path(os.environ["PENSTOCK_BENCHMARK_STARTED"]).touch()
    tokens = job.batch * LENGTH
    config = json.loads((Path(job.checkpoint) / "config.json").read_text())
    # of a layer that runs again, of the logits and their gradients, of the layers' inputs
    transient = tokens * (34 * 2 * config["hidden_size"] + 14 * config["vocab_size"])
    transient += tokens * 2 * config["hidden_size"] * config["num_hidden_layers"]
    host = job.cap_nbytes - taken - transient - 96 * MIB
    model, optimizer = penstock.prepare(
        job.checkpoint,
        optimizer=penstock.AdamW(lr=1e-5, max_grad_norm=job.clip),
        disk=job.run,
        max_memory={"host": host},
        device="cpu",
        activations="recompute",
        updates="backward" if job.clip is None else "step",
    )
    found = measure_steps(
        job,
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        lambda loss: loss.backward(),
        lambda: (optimizer.step(), optimizer.zero_grad()),
        lambda: optimizer.training.finish(),
    )
    plan = model.penstock.plan
    found |= {"host_nbytes": host, "streamed_nbytes": sum(b.nbytes for b in plan.blocks if b.home == "disk")}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["threads"] = torch.get_num_threads()
    penstock.close(model)
    return found


def resident_worker(job: Job) -> dict[str, Any]:
    """Plain PyTorch: masters in fp32, updated by torch.optim.AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    Path(os.environ["PENSTOCK_BENCHMARK_STARTED"]).touch()
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

    return measure_steps(
        job,
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        lambda loss: loss.backward(),
        update,
        lambda: None,
    )


def rates_worker(job: Job) -> dict[str, Any]:
    """The parts of the bound: the update with its checksum, and the drive read and written at once."""
    import torch

    from penstock.kernels.adamw import AdamWHyper
    from penstock.kernels.optimizers import optimizer
    from penstock.kernels.scratch import Scratch
    from penstock.memory.arena import HostArena
    from penstock.memory.disk import DiskEngine
    from penstock.memory.image import whole_window
    from penstock.memory.store import checksum

    Path(os.environ["PENSTOCK_BENCHMARK_STARTED"]).touch()
    count = 1 << 20
    arena = HostArena(8 * 12 * count)
    raw = arena.view(0, 12 * count)
    arrays = [torch.frombuffer(raw, dtype=torch.float32, count=count, offset=4 * count * i) for i in range(3)]
    for array in arrays:
        array.fill_(0.01)
    gradient, weight = (torch.full((count,), 0.01, dtype=torch.bfloat16) for _ in range(2))
    kernel, scratch = optimizer("adamw"), Scratch.of()

    def best(work: Any, repeats: int = 8) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    update_s = best(
        lambda: kernel.update(arrays[0], arrays[1:], gradient, AdamWHyper(lr=1e-5), step=2, scratch=scratch, out=weight)
    )
    checksum_s = best(lambda: checksum(raw))
    engine, nbytes = DiskEngine(), 12 * count
    path = os.path.join(job.run, "mixed.bin")
    slots = [arena.view(i * nbytes, nbytes) for i in range(8)]
    places = 32
    for place in range(2 * places):
        engine.write(path, place * nbytes, slots[place % 8]).wait()
    mixed = []
    for _ in range(3):
        start = time.perf_counter()
        for place in range(0, places, 4):
            under_way = []
            for i in range(4):
                window = whole_window(path, (place + i) * nbytes, nbytes)
                under_way.append(engine.read([window], [], slots[i]))
                under_way.append(engine.write(path, (places + place + i) * nbytes, slots[4 + i]))
            for transfer in under_way:
                transfer.wait()
        mixed.append(2 * places * nbytes / (time.perf_counter() - start))
    engine.close()
    os.unlink(path)
    return {"update_per_s": count / update_s, "checksum_per_s": nbytes / checksum_s, "mixed_rate": max(mixed)}


WORKERS = {"penstock": penstock_worker, "resident": resident_worker, "rates": rates_worker}


def run(job: Job, *, capped: bool, timeout_s: float) -> dict[str, Any]:
    """One worker; its report, its peak, or why there is none."""
    print(f"{job.way}, batch {job.batch} x {LENGTH}, clip {job.clip} ...", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        group = stack.enter_context(MemoryCgroup(cap_nbytes=job.cap_nbytes)) if capped else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=job.run, prefix="training-")))
        memory = stack.enter_context(ProvidedMemory(job.cap_nbytes))
        output = stack.enter_context(tempfile.TemporaryFile("w+"))
        drop_caches()
        started = scratch / "started"
        inside = scratch / "run"
        if job.way == "rates":
            inside.mkdir()
        command = [sys.executable, "-m", "benchmarks.training", WORKER, json.dumps({**asdict(job), "run": str(inside)})]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PENSTOCK_BENCHMARK_STARTED": str(started)}
        popen: Any = group.popen if group else partial(subprocess.Popen, text=True)
        process = popen(command, stdout=output, stderr=subprocess.PIPE, cwd=CHECKOUT, env=environment)
        peak, timed_out = _watch(process, timeout_s, started, memory)
        complained = process.stderr.read().strip().splitlines()
        output.seek(0)
        said = output.read().splitlines()
        usage = group.usage() if group else None
    report: dict[str, Any] = {"peak_anonymous_nbytes": peak, "cgroup_peak_nbytes": usage and usage.peak_nbytes}
    if usage is not None and usage.oom_kill_count:
        report["failure"] = "killed: over the cap"
    elif timed_out:
        report["failure"] = f"timed out after {timeout_s:.0f} s"
    elif process.returncode or not said:
        report["failure"] = f"failed ({process.returncode}): {complained[-1] if complained else 'no message'}"
    else:
        report |= json.loads(said[-1])
    return report


def bound_s(report: dict[str, Any], resident: dict[str, Any], rates: dict[str, Any], *, clip: bool) -> float:
    """Seconds that no schedule on this machine could beat."""
    parameters = report["parameters"]
    update = parameters / rates["update_per_s"] + 2 * 12 * parameters / rates["checksum_per_s"]
    disk = (report["read_nbytes"] + report["written_nbytes"]) / rates["mixed_rate"]
    forward, backward = resident["forward_s"], resident["backward_s"]
    return float(backward + max(forward + update, disk) if clip else max(forward + backward + update, disk))


def options(parser: argparse.ArgumentParser) -> None:
    """What can be chosen."""
    parser.add_argument("--size", choices=sorted(SIZES), default="S")
    parser.add_argument("--cap", type=parse_nbytes, default=None, help="memory cgroup (default: 1, 3, 4 GiB)")
    parser.add_argument("--batch", default="1,4", help="comma-separated, of 256 tokens each (default: %(default)s)")
    parser.add_argument("--clip", default="none,1.0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8)


def main() -> None:
    """Command line."""
    arguments = arguments_of("training", __doc__, options)
    cap = arguments.cap or CAPS[arguments.size]
    require_privileges(cap)
    folder = arguments.dir or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = make(arguments.size, folder)
    rows, figures, measured = [], [], []
    for batch in map(int, arguments.batch.split(",")):
        for text in arguments.clip.split(","):
            clip = None if text == "none" else float(text)

            def job(way: str, batch: int = batch, clip: float | None = clip) -> Job:
                return Job(
                    way=way, checkpoint=str(checkpoint), run=str(folder), cap_nbytes=cap, batch=batch, clip=clip,
                    steps=arguments.steps,
                )  # fmt: skip

            rates = run(job("rates"), capped=False, timeout_s=arguments.timeout)
            ours = run(job("penstock"), capped=True, timeout_s=arguments.timeout)
            theirs = run(job("resident"), capped=False, timeout_s=arguments.timeout)
            name = f"{arguments.size}, {batch} x {LENGTH}, clip {text}"
            measured.append({"name": name, "penstock": ours, "resident": theirs, "rates": rates})
            if "failure" in ours or "failure" in theirs:
                print(name, ours.get("failure"), theirs.get("failure"), file=sys.stderr)
                continue
            bound = bound_s(ours, theirs, rates, clip=clip is not None)
            per = ours["parameters"]
            for way, report in (("penstock", ours), ("resident", theirs)):
                rows.append(
                    [
                        f"{name}: {way}",
                        f"{report['step_s']:.2f} ({report['best_s']:.2f})",
                        f"{report['forward_s']:.2f} + {report['backward_s']:.2f} + {report['update_s']:.2f}",
                        f"{batch * LENGTH / report['step_s']:.0f}",
                        f"{report['read_nbytes'] / per:.1f} / {report['written_nbytes'] / per:.1f}",
                        f"{(report['cgroup_peak_nbytes'] or report['peak_anonymous_nbytes']) / GIB:.2f}",
                        f"{bound:.2f}",
                        f"{report['step_s'] / bound:.2f}",
                    ]
                )
            equal = ours["losses"] == theirs["losses"]
            print(f"{name}: losses equal: {equal}", file=sys.stderr)
            figures.append(Figure(name=f"distance, {name}", value=ours["step_s"] / bound, goal=1.15))
            figures.append(Figure(name=f"over resident, {name}", value=ours["step_s"] / theirs["step_s"], goal=1.15))
    columns = (
        "run", "s/step (best)", "forward + backward + update", "tokens/s", "bytes/parameter\nread / written",
        "peak GiB", "bound s", "distance",
    )  # fmt: skip
    finish(arguments, table(f"training under {cap / GIB:g} GiB", columns, rows), figures, measured)


if __name__ == "__main__":
    if WORKER in sys.argv:
        given = Job(**json.loads(sys.argv[sys.argv.index(WORKER) + 1]))
        print(json.dumps(WORKERS[given.way](given)))
    else:
        main()
