"""Watches, from outside, how much memory a process holds while it streams a model of about 200 MiB.

Run as a program it is that process; imported, it starts one and samples its memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SAMPLE_SECONDS = 0.002
LARGE = ("llama", "t5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one run held."""

    baseline_nbytes: int
    """Anonymous memory with everything imported and warm, before the model."""
    peak_nbytes: int
    """The most seen from the start of the load (for offload: from its end) to the last sweep."""
    disk_read_nbytes: int
    exact: bool
    """Whether the streamed answer has the resident one's bits."""


def save(name: str, folder: Path) -> Path:
    """Write one of the large models as a checkpoint, and the resident answer beside it."""
    torch.manual_seed(0)
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": 4096}
    if name == "llama":
        model: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=512, intermediate_size=1536, num_hidden_layers=14, num_attention_heads=8, **special
            )
        )
    else:
        assert name == "t5", name
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=512, d_kv=64, d_ff=2048, num_layers=7, num_heads=8, decoder_start_token_id=0, **special
            )
        )
    model.save_pretrained(folder, max_shard_size="64MB")
    resident = type(model).from_pretrained(folder).eval().requires_grad_(False)
    torch.save(_answer(resident), folder.parent / f"{folder.name}.answer")
    return folder


def weight_nbytes(folder: Path) -> int:
    """Bytes of all shards of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, *, way: str, device: str, budget: dict[str, int]) -> Measured:
    """Run a model in a fresh process under `budget`, sampling its memory from here."""
    job = {"folder": str(folder), "way": way, "device": device, "budget": budget}
    # A fixed threshold keeps glibc from holding on to what the offloaded originals gave back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        [sys.executable, __file__, json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _expect(process.stdout.readline(), "warm")
            baseline = _held_nbytes(process.pid)
            watcher = _Watcher(process.pid)
            process.stdin.write("go\n")
            process.stdin.flush()
            if way == "offload":
                # While it is still whole, the module to offload is the caller's memory.
                _expect(process.stdout.readline(), "offloaded")
            watcher.start()
            result = json.loads(process.stdout.readline() or "{}")
            watcher.stop()
        finally:
            process.stdin.close()
            process.wait(timeout=60)
    assert process.returncode == 0, process.returncode
    return Measured(baseline_nbytes=baseline, peak_nbytes=watcher.peak_nbytes, **result)


class _Watcher(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_nbytes = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            self.peak_nbytes = max(self.peak_nbytes, _held_nbytes(self._pid))
            time.sleep(SAMPLE_SECONDS)

    def stop(self) -> None:
        self._done.set()
        self.join()


def _held_nbytes(pid: int) -> int:
    """Anonymous memory of a process. An anonymous mapping that is shared counts as shmem, so both are added."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem")) * 1024


def _expect(line: str, word: str) -> None:
    if line.strip() != word:
        raise AssertionError(f"the probe said {line!r} instead of {word!r}; its own error is above")


def _answer(model: Any) -> Tensor:
    ids = torch.randint(3, 4096, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens: Tensor = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    return tokens


def main(job: dict[str, Any]) -> None:
    """The process under watch: warm up, say so, wait, stream, report."""
    import penstock

    folder = Path(job["folder"])
    small = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    _answer(transformers.LlamaForCausalLM(small).eval())
    print("warm", flush=True)
    sys.stdin.readline()
    if job["way"] == "load":
        model = penstock.load(folder, max_memory=job["budget"], device=job["device"])
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        # clone: the tensors transformers loads lie in the mapped file, which is not anonymous memory.
        module = kind.from_pretrained(folder).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        model = penstock.offload(module, max_memory=job["budget"], device=job["device"])
        del module
        print("offloaded", flush=True)
    answers = [_answer(model) for _ in range(2)]
    expected = torch.load(folder.parent / f"{folder.name}.answer")
    print(
        json.dumps(
            {
                "disk_read_nbytes": model.penstock.statistics().disk_read_nbytes,
                "exact": all(torch.equal(expected, answer) for answer in answers),
            }
        ),
        flush=True,
    )
    penstock.close(model)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
