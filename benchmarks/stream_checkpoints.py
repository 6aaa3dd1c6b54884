"""Random checkpoints of about 1 GiB for the benchmarks of streaming: T5, BART, Whisper, a Llama and a draft for it.

    python -m benchmarks.stream_checkpoints t5
    python -m benchmarks.stream_checkpoints whisper --size tiny

Prints the folder. A folder that is there is used as it is: it gets its name only when it is whole.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from .reference_checkpoint import (
    CheckpointShape,
    default_folder,
    done_marker,
    require_free_disk,
    settle,
    write_checkpoint,
)

VERSION = 1
"""Part of every folder's name; raise it when a shape changes."""
NEEDED_NBYTES = {"full": int(1.2 * 2**30), "tiny": 2**26}


def _special(start: int) -> dict[str, Any]:
    """No end-of-sequence id, so that every run makes the tokens asked for."""
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": start}


def t5(size: str) -> transformers.PreTrainedModel:
    """Gated and untied, as T5 1.1: 0.54 B parameters, or a few."""
    full = size == "full"
    config = transformers.T5Config(
        vocab_size=32128 if full else 2048,
        d_model=1024 if full else 128,
        d_kv=64 if full else 32,
        d_ff=2816 if full else 384,
        num_layers=16 if full else 4,
        num_decoder_layers=16 if full else 4,
        num_heads=16 if full else 4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **{**_special(0), "tie_word_embeddings": False},
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(size: str) -> transformers.PreTrainedModel:
    """Embedding and head tied: 0.52 B parameters, or a few."""
    full = size == "full"
    config = transformers.BartConfig(
        vocab_size=50265 if full else 2048,
        max_position_embeddings=1024 if full else 256,
        d_model=1024 if full else 128,
        encoder_layers=16 if full else 4,
        decoder_layers=16 if full else 4,
        encoder_ffn_dim=4096 if full else 384,
        decoder_ffn_dim=4096 if full else 384,
        encoder_attention_heads=16 if full else 4,
        decoder_attention_heads=16 if full else 4,
        forced_eos_token_id=None,
        **_special(2),
    )
    return transformers.BartForConditionalGeneration(config)


def whisper(size: str) -> transformers.PreTrainedModel:
    """Widths of the large model, ten layers each way, six seconds of sound: 0.53 B parameters, or a few."""
    full = size == "full"
    config = transformers.WhisperConfig(
        vocab_size=51865 if full else 2048,
        num_mel_bins=80 if full else 16,
        d_model=1280 if full else 128,
        encoder_layers=10 if full else 4,
        decoder_layers=10 if full else 4,
        encoder_ffn_dim=5120 if full else 384,
        decoder_ffn_dim=5120 if full else 384,
        encoder_attention_heads=20 if full else 4,
        decoder_attention_heads=20 if full else 4,
        max_source_positions=300 if full else 32,
        max_target_positions=448 if full else 64,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **_special(2),
    )
    return transformers.WhisperForConditionalGeneration(config)


SAVED: dict[str, Callable[[str], transformers.PreTrainedModel]] = {"t5": t5, "bart": bart, "whisper": whisper}
"""Built in bf16 and saved by transformers: the peak is the model itself."""


def _llama(name: str, *, hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> CheckpointShape:
    return CheckpointShape(
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        layer_count=layers,
        head_count=heads,
        shard_nbytes=2 * 10**9,
    )


WRITTEN: dict[tuple[str, str], CheckpointShape] = {
    ("target", "full"): _llama("target", hidden=2048, ffn=5504, layers=8, heads=16, vocab=32000),
    ("target", "tiny"): _llama("target", hidden=256, ffn=768, layers=6, heads=4, vocab=2048),
    ("draft", "full"): _llama("draft", hidden=512, ffn=1376, layers=2, heads=8, vocab=32000),
    ("draft", "tiny"): _llama("draft", hidden=64, ffn=192, layers=2, heads=4, vocab=2048),
    ("small", "full"): _llama("small", hidden=1024, ffn=2816, layers=8, heads=16, vocab=8000),
    ("small", "tiny"): _llama("small", hidden=128, ffn=384, layers=4, heads=4, vocab=2048),
}
"""Written tensor by tensor. `target` has 0.54 B parameters, `draft` speaks its vocabulary, `small` has 0.12 B."""

NAMES = (*SAVED, "target", "draft", "small")


def ensure(name: str, size: str, folder: Path) -> Path:
    """The checkpoint `name` below `folder`, made if it is not there.

    Raises OSError when the disk is too small.
    """
    path = folder / f"{name}-{size}-v{VERSION}"
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    require_free_disk(folder, NEEDED_NBYTES[size])
    print(f"writing {path} ...", file=sys.stderr, flush=True)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if name in SAVED:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        SAVED[name](size).save_pretrained(unfinished)
        for file in unfinished.glob("*.safetensors"):
            with file.open("rb+") as opened:
                settle(opened)
    else:
        write_checkpoint(unfinished, WRITTEN[name, size])
        done_marker(unfinished).unlink()  # here the folder's own name says that it is whole
    unfinished.rename(path)
    return path


def main() -> None:
    """Command line: make one checkpoint and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream_checkpoints", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--size", choices=sorted(NEEDED_NBYTES), default="full")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(ensure(arguments.name, arguments.size, arguments.dir))
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
