"""Seconds to the first token of a prompt whose beginning is in the prefix store, in reads of that beginning.

    .venv/bin/python -m benchmarks.kv_first_token --json first.json
    python -m benchmarks.kv_first_token --context 512 --rounds 1                # tries the harness

The model of `kv_decode`. Its keys and values are made up and stored once. Each round is a conversation that begins: a
model of which nothing is known is looked at, as when one is loaded, and the clock starts; then come the prefix, into
an empty cache, and the tokens after it. ratio = s to the first token over bytes read / raw O_DIRECT rate of the same
files, the better of before and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .inference import parse_nbytes
from .kv_decode import GIB, MIB, fill, random_model
from .raw_disk import best_read_rate
from .reference_checkpoint import default_folder

GOAL = 1.3
AFTER = 16
"""Tokens of the prompt that no store has."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one beginning."""

    look_s: float
    """To find out how the model attends, once after it is loaded: not on the clock."""
    load_s: float
    """To have the prefix in the cache."""
    call_s: float
    """Of the tokens after it."""

    @property
    def s(self) -> float:
        """To the first token."""
        return self.load_s + self.call_s


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds."""

    context: int
    read_nbytes: int
    disk_nbytes_per_s: float
    resident_call_s: float
    """The same tokens after as many in memory, by transformers' own cache: what reading cannot change."""
    rounds: tuple[Round, ...]

    @property
    def s(self) -> float:
        """To the first token, the median."""
        return statistics.median(one.s for one in self.rounds)

    @property
    def read_s(self) -> float:
        """The least that reading takes."""
        return self.read_nbytes / self.disk_nbytes_per_s

    @property
    def ratio(self) -> float:
        """How many reads the first token takes."""
        return self.s / self.read_s


def measure(arguments: argparse.Namespace, folder: Path) -> Result:
    """Store, then begin some times."""
    import torch

    import penstock
    from penstock.memory.prefix import KvIdentity
    from penstock.runtime.kv.prefix import load_prefix, store_prefix

    torch.manual_seed(0)
    model = random_model(2 * arguments.context, arguments.group)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.context + AFTER,)).tolist()
    size = arguments.block_tokens
    name = KvIdentity(weights="made up", dtype="bfloat16", rope="default", layout="measured", block_tokens=size)

    def cache_of(owner: Any) -> Any:
        budget = {"host": arguments.host, "disk": arguments.disk}
        return penstock.TieredCache(owner.config, max_memory=budget, block_tokens=size, disk=folder)

    rounds, read_nbytes = [], 0
    with torch.no_grad(), penstock.PrefixStore(folder / "store", arguments.disk) as store:
        filled = cache_of(model)
        fill(filled, arguments.context)
        report = store_prefix(filled, store, name, tokens[: arguments.context])
        assert not report.reason, report.reason
        resident_call_s = _resident(filled, model, tokens)
        filled.close()
        files = [file for file in (folder / "store").rglob("*") if file.is_file() and file.stat().st_size > MIB]
        before = best_read_rate(files).nbytes_per_s
        for _ in range(arguments.rounds):
            stranger = copy.deepcopy(model)  # has a config of its own, of which nothing is known
            cache = cache_of(stranger)
            start_s = time.perf_counter()
            cache.look_at(stranger)
            looked_s = time.perf_counter()
            loaded = load_prefix(cache, store, name, tokens, always_read=True)
            loaded_s = time.perf_counter()
            rest = torch.tensor([tokens[loaded.tokens :]])
            stranger(input_ids=rest, past_key_values=cache, logits_to_keep=1).logits.argmax()
            end_s = time.perf_counter()
            rounds.append(Round(look_s=looked_s - start_s, load_s=loaded_s - looked_s, call_s=end_s - loaded_s))
            assert loaded.tokens == arguments.context // size * size, loaded
            read_nbytes = loaded.read_nbytes
            cache.close()
        after = best_read_rate(files).nbytes_per_s
    return Result(
        context=arguments.context,
        read_nbytes=read_nbytes,
        disk_nbytes_per_s=max(before, after),
        resident_call_s=resident_call_s,
        rounds=tuple(rounds),
    )


def _resident(filled: Any, model: Any, tokens: list[int]) -> float:
    """Seconds of the tokens after the prefix, where all of it is in transformers' own cache: the median of three."""
    import torch
    from transformers import DynamicCache

    own = DynamicCache(config=model.config)
    for number in range(len(own.layers)):
        own.update(*filled.tiers.reader.whole(number), number)
    times = []
    for _ in range(3):
        start_s = time.perf_counter()
        model(input_ids=torch.tensor([tokens[-AFTER:]]), past_key_values=own, logits_to_keep=1).logits.argmax()
        times.append(time.perf_counter() - start_s)
        own.crop(-AFTER)
    return statistics.median(times)


def render(result: Result) -> str:
    """Lines for people."""
    look, load, call = (statistics.median(getattr(one, f"{name}_s") for one in result.rounds) for name in _PARTS)
    return "\n".join(
        (
            f"prefix of {result.context} tokens, {result.read_nbytes / MIB:.0f} MiB at "
            f"{result.disk_nbytes_per_s / 1e9:.2f} GB/s: {result.read_s:.3f} s",
            f"first token after {result.s:.3f} s: load {load:.3f}, {AFTER} tokens {call:.3f} (after a resident prefix "
            f"{result.resident_call_s:.3f}); before that, looking at the model took {look:.3f}",
            f"ratio {result.ratio:.2f} reads (goal {GOAL}); without the tokens' own time "
            f"{(result.s - result.resident_call_s) / result.read_s:.2f}",
        )
    )


_PARTS = ("look", "load", "call")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_first_token", description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prefix")
    parser.add_argument("--host", type=parse_nbytes, default=256 * MIB, help="host memory for keys and values")
    parser.add_argument("--disk", type=parse_nbytes, default=8 * GIB, help="of the cache, and of the store")
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=2, help="query heads per key-value head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="folder for the store")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    root = arguments.dir or default_folder()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        result = measure(arguments, Path(folder))
    print(render(result))
    if arguments.json:
        document = asdict(result) | {"s": result.s, "read_s": result.read_s, "ratio": result.ratio}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
