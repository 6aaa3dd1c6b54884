"""What `penstock plan --sizes` predicts against what a process holds, for eight models at work.

    python -m benchmarks.plan_sizes
    python -m benchmarks.plan_sizes --pairs llama-inference,gpt2-adamw --json result.json

Each pair runs in a process of its own: a random model of some hundred MiB is built, then it generates with its KV
cache, or takes three training steps with torch's own AdamW. The measured figure is the peak of RssAnon, sampled from
outside every millisecond from the start of the work, less what the process held before the model was built, with
everything imported and a small model of the same kind run once. To keep the C allocator's habits out of it, blocks of
64 KiB and more are mapped one by one and given back at once (MALLOC_MMAP_THRESHOLD_), there is one arena
(MALLOC_ARENA_MAX), and malloc_trim runs before the baseline and before the work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .inference import CHECKOUT
from .streams import Figure, finish, table

MIB = 2**20
GOAL = 0.10
SAMPLE_S = 0.001
STEPS = 3
RANK = 16
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

_TEXT = {"vocab_size": 16_000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_WIDE = {**_TEXT, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024}
_LLAMA = {**_WIDE, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 64}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model and what it does."""

    name: str
    architecture: str
    """Class of transformers."""
    config: dict[str, Any]
    train: str | None
    batch: int
    context: int
    dtype: str = "float32"


PAIRS = (
    Pair(name="llama-inference", architecture="LlamaForCausalLM", config=_LLAMA, train=None, batch=8, context=512),
    Pair(
        name="qwen3-bf16-inference", architecture="Qwen3ForCausalLM",
        config={**_LLAMA, "num_hidden_layers": 16, "tie_word_embeddings": True}, train=None, batch=4, context=512,
        dtype="bfloat16",
    ),
    Pair(
        name="gemma3-inference", architecture="Gemma3ForCausalLM", config={**_LLAMA, "sliding_window": 128},
        train=None, batch=4, context=768,
    ),
    Pair(
        name="whisper-inference", architecture="WhisperForConditionalGeneration",
        config={"d_model": 512, "encoder_layers": 8, "decoder_layers": 8, "encoder_ffn_dim": 2048,
                "encoder_attention_heads": 8, "decoder_attention_heads": 8,
                "decoder_ffn_dim": 2048, "vocab_size": 20_000, "begin_suppress_tokens": None, "suppress_tokens": None,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
        train=None, batch=1, context=64,
    ),
    Pair(
        name="gpt2-adamw", architecture="GPT2LMHeadModel",
        config={**_TEXT, "n_positions": 512, "n_layer": 6}, train="adamw", batch=4, context=256,
    ),
    Pair(
        name="t5-adamw", architecture="T5ForConditionalGeneration",
        config={"vocab_size": 16_000, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
                "decoder_start_token_id": 0}, train="adamw", batch=2, context=256,
    ),
    Pair(
        name="vit-adamw", architecture="ViTForImageClassification",
        config={"num_hidden_layers": 8, "num_labels": 10}, train="adamw", batch=8, context=2,
    ),
    Pair(
        name="opt-lora", architecture="OPTForCausalLM",
        config={**_TEXT, "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 8,
                "num_attention_heads": 12, "max_position_embeddings": 1024}, train="lora", batch=4, context=256,
    ),
)  # fmt: skip


def config_of(pair: Pair, changes: dict[str, Any] | None = None) -> Any:
    """The transformers config of a pair."""
    import transformers

    kind: Any = getattr(transformers, pair.architecture)
    config = kind.config_class(**{**pair.config, **(changes or {})})
    config.architectures, config.dtype = [pair.architecture], pair.dtype
    return config


def predict(pair: Pair) -> dict[str, Any]:
    """What the command line says, run as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(pair).save_pretrained(folder)
        command = [sys.executable, "-m", "penstock", "plan", folder, "--sizes", "--json", "--device", "cpu"]
        command += ["--batch", str(pair.batch), "--context", str(pair.context), "--rank", str(RANK)]
        command += ["--train", pair.train] if pair.train else []
        started_s = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return {**json.loads(done.stdout), "took_s": time.perf_counter() - started_s}


def measure(pair: Pair) -> tuple[int, int]:
    """Baseline and peak of the anonymous memory of a process that does the work, in bytes."""
    command = [sys.executable, "-m", "benchmarks.plan_sizes", "--worker", pair.name]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=CHECKOUT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _expect(process.stdout.readline(), "warm")
        baseline = anonymous_nbytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        _expect(process.stdout.readline(), "built")
        peaks = [0]
        over = threading.Event()

        def sample() -> None:
            while not over.is_set():
                peaks[0] = max(peaks[0], anonymous_nbytes(process.pid))
                time.sleep(SAMPLE_S)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
            _expect(process.stdout.readline(), "done")
        finally:
            over.set()
            sampler.join()
            process.stdin.close()
    return baseline, peaks[0]


def anonymous_nbytes(pid: int) -> int:
    """RssAnon of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _expect(line: str, word: str) -> None:
    if line.strip() != word:
        raise OSError(f"the worker said {line!r} instead of {word!r}; its own error is above")


def worker(pair: Pair) -> None:
    """The process that is measured: warm up, wait, build, wait, work."""
    import torch
    import transformers

    kind: Any = getattr(transformers, pair.architecture)
    layers = {name: 1 for name in pair.config if name.endswith("_layers") or name in ("num_layers", "n_layer")}
    small = {**layers, **({"vocab_size": 1000} if "vocab_size" in pair.config else {})}
    _work(_built(kind, config_of(pair, small), pair), pair, context=min(pair.context, 16))
    _settle()
    print("warm", flush=True)
    sys.stdin.readline()
    torch.manual_seed(0)
    model = _built(kind, config_of(pair), pair)
    _settle()
    print("built", flush=True)
    sys.stdin.readline()
    _work(model, pair, context=pair.context)
    print("done", flush=True)


def _built(kind: Any, config: Any, pair: Pair) -> Any:
    import torch

    torch.set_default_dtype(getattr(torch, pair.dtype))
    try:
        return kind(config).train(pair.train is not None)
    finally:
        torch.set_default_dtype(torch.float32)


def _settle() -> None:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    time.sleep(0.2)


def _work(model: Any, pair: Pair, context: int) -> None:
    import torch

    if pair.train is None:
        model.requires_grad_(False)
        _generate(model, pair, context)
        return
    if pair.train == "lora":
        model.requires_grad_(False)
        _adapt(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(STEPS):
        model(**_batch(model, pair, context)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _batch(model: Any, pair: Pair, context: int) -> dict[str, Any]:
    import torch

    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(pair.batch, 3, size, size), "labels": torch.arange(pair.batch)}
    ids = torch.randint(3, model.config.vocab_size, (pair.batch, context))
    return {"input_ids": ids, "labels": ids}


def _generate(model: Any, pair: Pair, context: int) -> None:
    import torch

    options = {"do_sample": False, "max_new_tokens": 8}
    if model.main_input_name == "input_features":
        sound = torch.randn(pair.batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        model.generate(sound.to(model.dtype), **{**options, "max_new_tokens": context - 4, "min_new_tokens": 8})
        return
    ids = torch.randint(3, model.config.vocab_size, (pair.batch, context - 8))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def _adapt(model: Any) -> None:
    """Adapters beside every linear layer of the stacks, as a user of LoRA would have them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdecimal() for part in path.split(".")):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, adapted(module))


def adapted(base: Any) -> Any:
    """A linear layer with an adapter."""
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide, narrow = (base.nf, base.nx) if hasattr(base, "nf") else (base.out_features, base.in_features)
            self.base = base
            self.down = nn.Linear(narrow, RANK, bias=False)
            self.up = nn.Linear(RANK, wide, bias=False)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x)) * 2.0

    return Adapted()


def _row(pair: Pair) -> dict[str, Any]:
    predicted = predict(pair)
    baseline, peak = measure(pair)
    measured = peak - baseline
    total = predicted["total_nbytes"]
    return {
        **asdict(pair),
        "predicted_nbytes": total,
        "predicted": predicted["peak"],
        "took_s": predicted["took_s"],
        "baseline_nbytes": baseline,
        "measured_nbytes": measured,
        "error": total / measured - 1,
    }


COLUMNS = (
    "pair",
    "weights\nMiB",
    "batch x\ncontext",
    "predicted\nMiB",
    "measured\nMiB",
    "error",
    "seconds\nto predict",
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['predicted']['weights'] / MIB:.0f}",
        f"{row['batch']} x {row['context']}",
        f"{row['predicted_nbytes'] / MIB:.0f}",
        f"{row['measured_nbytes'] / MIB:.0f}",
        f"{row['error']:+.1%}",
        f"{row['took_s']:.1f}",
    ]


def _options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [pair.name for pair in PAIRS]

    def pairs(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in names]:
            raise argparse.ArgumentTypeError(f"unknown pairs {unknown}; there are {names}")
        return text.split(",")

    parser.add_argument("--pairs", type=pairs, default=names, help=f"comma-separated: {','.join(names)}")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def main() -> None:
    """Command line."""
    arguments = _options()
    by_name = {pair.name: pair for pair in PAIRS}
    if arguments.worker:
        worker(by_name[arguments.worker])
        return
    rows = []
    for name in arguments.pairs:
        rows.append(_row(by_name[name]))
        print("  ".join(_cells(rows[-1])), file=sys.stderr, flush=True)
    shown = table("predicted and measured peak of anonymous memory", COLUMNS, [_cells(row) for row in rows])
    figures = [Figure(name=f"{row['name']}, relative error", value=abs(row["error"]), goal=GOAL) for row in rows]
    finish(arguments, shown, figures, rows)


if __name__ == "__main__":
    main()
