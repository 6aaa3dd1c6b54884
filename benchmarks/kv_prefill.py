"""A prompt whose keys and values go to disk as they are made: how much slower than with all of them in memory.

    .venv/bin/python -m benchmarks.kv_prefill --json prefill.json
    python -m benchmarks.kv_prefill --context 1024 --host 8MiB --rounds 1       # tries the harness

The model of `kv_decode`; the prompt is random. Rounds alternate between transformers' own cache, which keeps
everything, and ours; slowdown = median of ours over median of its own, less 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .inference import parse_nbytes
from .kv_decode import DIM, GIB, HEADS, LAYERS, MIB, random_model
from .reference_checkpoint import default_folder

GOAL = 0.05


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds. Seconds are of the whole prompt."""

    context: int
    chunk: int
    """Tokens that are computed at once; 0 for all."""
    host_nbytes: int
    kv_nbytes: int
    resident_s: tuple[float, ...]
    tiered_s: tuple[float, ...]
    written_nbytes: int
    difference: float
    """The largest of the last token's logits, between both caches."""

    @property
    def slowdown(self) -> float:
        """What keeping keys and values in tiers adds, as a part of the time without."""
        return statistics.median(self.tiered_s) / statistics.median(self.resident_s) - 1


def measure(arguments: argparse.Namespace, folder: str) -> Result:
    """Alternate, after a short prompt that shows how the model attends."""
    import torch
    from transformers import DynamicCache

    import penstock

    torch.manual_seed(0)
    model = random_model(arguments.context, arguments.group)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.context))
    budget = {"host": arguments.host, "disk": arguments.disk}

    def tiered() -> Any:
        return penstock.TieredCache(model.config, max_memory=budget, block_tokens=arguments.block_tokens, disk=folder)

    resident_s, tiered_s, difference, written_nbytes = [], [], 0.0, 0
    with torch.no_grad():
        short = tiered()
        for _ in range(2):
            prefill(model, short, ids[:, :64], 0)
        short.close()
        for _ in range(arguments.rounds):
            seconds, expected = prefill(model, DynamicCache(config=model.config), ids, arguments.chunk)
            resident_s.append(seconds)
            cache = tiered()
            seconds, logits = prefill(model, cache, ids, arguments.chunk)
            tiered_s.append(seconds)
            written_nbytes = cache.statistics().written_nbytes
            difference = max(difference, float((logits - expected).abs().max()))
            cache.close()
    return Result(
        context=arguments.context,
        chunk=arguments.chunk,
        host_nbytes=arguments.host,
        kv_nbytes=2 * LAYERS * HEADS * DIM * 2 * arguments.context,
        resident_s=tuple(resident_s),
        tiered_s=tuple(tiered_s),
        written_nbytes=written_nbytes,
        difference=difference,
    )


def prefill(model: Any, cache: Any, ids: Any, chunk: int) -> tuple[float, Any]:
    """Seconds, and the logits of the last token in fp32."""
    start_s = time.perf_counter()
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        some = ids[:, start : start + (chunk or ids.shape[1])]
        logits = model(input_ids=some, past_key_values=cache, logits_to_keep=1).logits
    return time.perf_counter() - start_s, logits.float()


def render(result: Result) -> str:
    """Lines for people."""
    resident, tiered = (statistics.median(times) for times in (result.resident_s, result.tiered_s))
    at_once = f"{result.chunk} at once" if result.chunk else "all at once"
    return "\n".join(
        (
            f"prompt of {result.context} tokens, {at_once}: {result.kv_nbytes / GIB:.2f} GiB of keys and values, "
            f"{result.host_nbytes / MIB:.0f} MiB in RAM, {result.written_nbytes / GIB:.2f} GiB written",
            f"resident {resident:.2f} s, in tiers {tiered:.2f} s: slowdown {result.slowdown:+.1%} (goal {GOAL:.0%})",
            f"logits of the last token differ by {result.difference:.2e} at most, in bf16",
        )
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of the prompt that are computed at once; 0: all")
    parser.add_argument("--host", type=parse_nbytes, default=64 * MIB, help="host memory for keys and values")
    parser.add_argument("--disk", type=parse_nbytes, default=8 * GIB)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=2, help="query heads per key-value head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="folder for keys and values")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    root = arguments.dir or default_folder()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        result = measure(arguments, folder)
    print(render(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result) | {"slowdown": result.slowdown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
