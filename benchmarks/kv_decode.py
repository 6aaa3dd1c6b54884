"""Decode with a context whose keys and values exceed memory: how far from what disk and attention allow.

    sudo .venv/bin/python -m benchmarks.kv_decode --json kv.json
    python -m benchmarks.kv_decode --context 4096 --host 8MiB --new-tokens 4 --cap 0      # tries the harness, no cgroup
    python -m benchmarks.kv_decode --device emulated:h2d=2GiB/s,d2h=2GiB/s --device-kv 128MiB --host 3GiB --cap 0

A random model of 8 layers (8 key-value heads of 64, hidden 1024, bf16); its cache is filled directly, so that no prompt
of that length has to be computed. Then tokens are decoded one by one, in a process of its own under a cap.

bound = max(bytes read per token / raw O_DIRECT rate over the same files, attention + the rest of the model), where the
bytes are the least that any plan reads (all keys and values less what host memory holds), attention is timed on blocks
that are in memory, and the rest is a token of the same model with an empty cache. distance = s/token over it.

With a device, what is in host memory is attended to by CPU and link together, so the bound is bytes / (attention's rate
+ the link's); the same run with all of it sent over the link is told beside it. An emulated device computes on the
host's cores, which attend to all bytes then, wherever they lie: there the bound is no less than that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cgroup import CgroupUnavailableError, MemoryCgroup
from .inference import parse_nbytes
from .raw_disk import best_read_rate
from .reference_checkpoint import default_folder

MIB, GIB = 2**20, 2**30
LAYERS, HEADS, DIM, HIDDEN = 8, 8, 64, 1024
PIECE = 1024
"""Tokens that the cache is filled with at once."""
GOAL = 1.15


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. Seconds are per token, bytes too, where nothing else is said."""

    context: int
    kv_nbytes: int
    """Of the whole context."""
    host_nbytes: int
    block_tokens: int
    group: int
    s: float
    """Median over the tokens after the first."""
    s_best: float
    read_nbytes: float
    written_nbytes: float
    token_nbytes: int
    """Keys and values of one token."""
    least_nbytes: int
    """That any plan reads: what host memory cannot hold."""
    disk_nbytes_per_s: float
    disk_before_after: tuple[float, float]
    attention_s: float
    """All keys and values, at the rate of blocks that are in memory."""
    rest_s: float
    arena_nbytes: int
    dram_nbytes_per_s: float
    """How fast memory is read, by as many threads as compute."""
    device: str = ""
    device_nbytes: int = 0
    """Of keys and values on the device."""
    crossed_nbytes: float = 0.0
    link_nbytes_per_s: float = 0.0
    streamed_s: float = 0.0
    """All that is in host memory sent over the link."""

    @property
    def attention_part(self) -> float:
        """How much of that rate attention to blocks in memory reaches."""
        return self.kv_nbytes / self.attention_s / self.dram_nbytes_per_s

    @property
    def bound_s(self) -> float:
        """The least time of a token."""
        if not self.device:
            return max(self.least_nbytes / self.disk_nbytes_per_s, self.attention_s + self.rest_s)
        cold = self.kv_nbytes - self.device_nbytes
        rate = self.kv_nbytes / self.attention_s
        together_s = cold / (rate + self.link_nbytes_per_s) + self.rest_s
        cores = self.attention_s + self.rest_s if self.device.startswith("emulated") else 0.0
        return max(self.least_nbytes / self.disk_nbytes_per_s, together_s, cores)

    @property
    def distance(self) -> float:
        """How far from it."""
        return self.s / self.bound_s


def measure(arguments: argparse.Namespace) -> Result:
    """In a process of its own."""
    import torch

    import penstock

    torch.manual_seed(0)
    model = random_model(2 * arguments.context, arguments.group)
    with torch.no_grad():
        budget = {"host": arguments.host, "disk": arguments.disk}
        if arguments.device:
            budget["device"] = arguments.device_kv
        settings = {"max_memory": budget, "block_tokens": arguments.block_tokens, "disk": arguments.dir}
        settings["device"] = arguments.device or "cpu"
        rest = penstock.TieredCache(model.config, **settings)  # its first call shows how the model attends, too
        rest_s = statistics.median(_tokens(model, rest, 9)[1:])
        rest.close()
        cache = penstock.TieredCache(model.config, **settings)
        fill(cache, arguments.context)
        files = sorted(Path(arguments.dir).glob("penstock-*/*.kv"))
        disk_before = best_read_rate(files).nbytes_per_s if files else float("inf")
        attention_rate = _attention_rate(cache, model, arguments)
        _tokens(model, cache, 2)
        before = cache.statistics()
        times = _tokens(model, cache, arguments.new_tokens)
        after = cache.statistics()
        disk_after = best_read_rate(files).nbytes_per_s if files else float("inf")
        link_rate, streamed_s = _streamed(cache, model, arguments) if arguments.device else (0.0, 0.0)
        cache.close()
    token_nbytes = after.appended_nbytes // after.tokens
    kv_nbytes = token_nbytes * arguments.context
    return Result(
        context=arguments.context,
        kv_nbytes=kv_nbytes,
        host_nbytes=arguments.host,
        block_tokens=arguments.block_tokens,
        group=arguments.group,
        s=statistics.median(times),
        s_best=min(times),
        read_nbytes=(after.read_nbytes - before.read_nbytes) / arguments.new_tokens,
        written_nbytes=(after.written_nbytes - before.written_nbytes) / arguments.new_tokens,
        token_nbytes=token_nbytes,
        least_nbytes=max(0, kv_nbytes - arguments.host - (arguments.device_kv if arguments.device else 0)),
        disk_nbytes_per_s=max(disk_before, disk_after),
        disk_before_after=(disk_before, disk_after),
        attention_s=kv_nbytes / attention_rate,
        rest_s=rest_s,
        arena_nbytes=after.arena_nbytes,
        dram_nbytes_per_s=_dram_rate(),
        device=arguments.device,
        device_nbytes=after.device_nbytes,
        crossed_nbytes=(after.fetched_nbytes - before.fetched_nbytes) / arguments.new_tokens,
        link_nbytes_per_s=link_rate,
        streamed_s=streamed_s,
    )


class _All:
    """Instead of a balance: everything crosses."""

    def to_cross(self, queries: int, *, pieces: int, nbytes: int) -> int:
        return pieces

    def hear(self, queries: int, seen: Any) -> None:
        """Nothing is learned."""


def _streamed(cache: Any, model: Any, arguments: argparse.Namespace) -> tuple[float, float]:
    """Bytes per second of the link, the best of some times, and seconds per token when all crosses it."""
    crossing = cache.tiers.reader.crossing
    memory, host = crossing._memory, crossing._host
    rates = []
    for _ in range(5):
        start_s = time.perf_counter()
        memory.device.wait(memory.fetch(host, 0, 0, memory.ring_nbytes, after=memory.device.computed()))
        rates.append(memory.ring_nbytes / (time.perf_counter() - start_s))
    crossing.balance = _All()
    return max(rates), statistics.median(_tokens(model, cache, max(2, arguments.new_tokens // 4)))


def random_model(positions: int, group: int) -> Any:
    """The model, in bf16: `group` query heads per key-value head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * group,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def fill(cache: Any, context: int) -> None:
    """Random keys and values, layer by layer."""
    import torch

    for number in range(LAYERS):
        for start in range(0, context, PIECE):
            count = min(PIECE, context - start)
            keys, values = (torch.randn(1, HEADS, count, DIM).to(torch.bfloat16) for _ in range(2))
            cache.tiers.append(number, keys, values)


def _tokens(model: Any, cache: Any, count: int) -> list[float]:
    """Seconds of each token."""
    import torch

    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        times.append(time.perf_counter() - start_s)
    return times


def _attention_rate(cache: Any, model: Any, arguments: argparse.Namespace) -> float:
    """Bytes per second of attention to blocks that are in host memory: the best pass over all layers in two seconds.

    All layers, since one layer's blocks alone would be read from the processor's cache.
    """
    import torch

    from penstock.runtime.kv.attention import Asked, attend

    stores = [cache.tiers.store(number) for number in range(LAYERS)]
    layers = [[store.here(piece) for piece in store.placement().host] for store in stores]
    nbytes = sum(keys.numel() + values.numel() for pieces in layers for keys, values, _ in pieces) * 2
    query = torch.randn(1, HEADS * arguments.group, 1, DIM).to(torch.bfloat16)
    new = torch.randn(1, HEADS, 1, DIM).to(torch.bfloat16)
    widening = cache.tiers.widening
    best, end_s = float("inf"), time.perf_counter() + 2
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        for pieces in layers:
            attend(Asked(query=query, keys=new, values=new, scale=0.125, widening=widening), iter(pieces))
        best = min(best, time.perf_counter() - start_s)
    return nbytes / best


def _dram_rate() -> float:
    """Bytes per second that torch's threads could read at."""
    import torch

    from penstock.runtime.calibration.dram import memory_rates

    threads = torch.get_num_threads()
    return memory_rates(nbytes=256 * MIB, threads=(threads,), seconds=1.5).read.at(threads)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--host", type=parse_nbytes, default=256 * MIB, help="host memory for keys and values")
    parser.add_argument("--disk", type=parse_nbytes, default=8 * GIB)
    parser.add_argument("--device", default="", help="with memory of its own, as penstock.load has it; default: none")
    parser.add_argument("--device-kv", type=parse_nbytes, default=128 * MIB, help="of it, for keys and values")
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=2, help="query heads per key-value head")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cap", type=parse_nbytes, default=2 * GIB, help="of the cgroup; 0 for none")
    parser.add_argument("--dir", type=Path, default=None, help="folder for keys and values")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        json.dump(asdict(measure(arguments)), sys.stdout)
        return
    root = arguments.dir or default_folder()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        figures, peak = _run(arguments, folder)
    result = Result(**figures | {"disk_before_after": tuple(figures["disk_before_after"])})
    print(render(result, peak))
    if arguments.json:
        document = asdict(result) | {"bound_s": result.bound_s, "distance": result.distance, "peak_nbytes": peak}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def _run(arguments: argparse.Namespace, folder: str) -> tuple[dict[str, Any], int | None]:
    command = [sys.executable, "-m", "benchmarks.kv_decode", "--worker", "--dir", folder]
    for name in ("context", "host", "disk", "device", "device_kv", "block_tokens", "group", "new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    try:
        with MemoryCgroup(cap_nbytes=arguments.cap) if arguments.cap else nullcontext() as group:
            start = group.popen if group is not None else subprocess.Popen
            process = start(command, stdout=subprocess.PIPE, env=os.environ)
            output, _ = process.communicate()
            usage = group.usage() if group is not None else None
    except CgroupUnavailableError as error:
        sys.exit(f"error: {error}, or measure without a cap: --cap 0")
    if process.returncode:
        killed = usage is not None and usage.oom_kill_count
        sys.exit(f"error: the run {'reached its cap and was killed' if killed else 'failed'} ({process.returncode})")
    return json.loads(output), usage.peak_nbytes if usage is not None else None


def render(result: Result, peak_nbytes: int | None) -> str:
    """Lines for people."""
    before, after = (f"{rate / 1e9:.2f}" for rate in result.disk_before_after)
    disk_s = result.least_nbytes / result.disk_nbytes_per_s
    device = ()
    if result.device:
        device = (
            f"{result.device}: {result.device_nbytes / MIB:.0f} MiB on it, {result.crossed_nbytes / MIB:.0f} MiB a "
            f"token cross at {result.link_nbytes_per_s / 1e9:.2f} GB/s; all over the link "
            f"{result.streamed_s:.3f} s/token, {result.streamed_s / result.s:.2f} times as long (goal 3)",
        )
    peak = f", peak of the cgroup {peak_nbytes / GIB:.2f} GiB" if peak_nbytes is not None else ""
    return "\n".join(
        (
            f"context {result.context} tokens, {result.kv_nbytes / GIB:.2f} GiB of keys and values, "
            f"{result.host_nbytes / MIB:.0f} MiB in RAM, blocks of {result.block_tokens}, group {result.group}",
            f"s/token {result.s:.3f} (best {result.s_best:.3f}), bound {result.bound_s:.3f}: disk {disk_s:.3f}, "
            f"attention {result.attention_s:.3f} + rest {result.rest_s:.3f}",
            f"distance {result.distance:.3f} (goal {GOAL})",
            *device,
            f"attention to blocks in memory {result.kv_nbytes / result.attention_s / 1e9:.1f} GB/s, "
            f"{result.attention_part:.0%} of the {result.dram_nbytes_per_s / 1e9:.1f} GB/s that memory is read at",
            f"disk {before} GB/s before, {after} after; read per token {result.read_nbytes / GIB:.3f} GiB, at least "
            f"{result.least_nbytes / GIB:.3f}",
            f"written per token {result.written_nbytes:.0f} bytes, {result.written_nbytes / result.token_nbytes:.2f} "
            f"times its keys and values",
            f"arena {result.arena_nbytes / MIB:.0f} MiB{peak}",
        )
    )


if __name__ == "__main__":
    main()
