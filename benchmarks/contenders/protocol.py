"""What the harness tells a contender on its command line, and what a contender reports on stdout."""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTED_VARIABLE = "PENSTOCK_BENCHMARK_STARTED"
"""Names a file that a contender makes when its imports are done and its clock starts."""
FIRST_PROMPT_ID = 300
"""Below lie special tokens and bytes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: this many greedy tokens for this many prompts."""

    checkpoint: Path
    """Folder with config.json and safetensors."""
    gguf: Path
    """The same weights for llama.cpp; need not exist for the others."""
    scratch: Path
    """An existing folder on the checkpoint's disk for whatever the contender wants to write."""
    cap_nbytes: int
    """What the memory cgroup allows, for contenders that must be told."""
    batch: int
    prompt_length: int
    new_tokens: int

    def command_line(self) -> list[str]:
        """The arguments from which `parse_job` makes an equal job."""
        return [text for name, value in asdict(self).items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def prompts(self) -> list[list[int]]:
        """Token ids, shape [batch, prompt_length]; each row is fixed by its number and differs from the others."""
        vocab_size = json.loads((self.checkpoint / "config.json").read_text())["vocab_size"]
        return [
            random.Random(row).choices(range(FIRST_PROMPT_ID, vocab_size), k=self.prompt_length)
            for row in range(self.batch)
        ]


def parse_job() -> Job:
    """The job on this process's command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("checkpoint", "gguf", "scratch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("cap-nbytes", "batch", "prompt-length", "new-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Job(**vars(parser.parse_args()))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a contender saw. Times in seconds since its imports were done; bytes since the process began."""

    loaded_s: float
    """When the model was ready to generate."""
    token_s: list[float]
    """When each new token (of all rows of the batch) was known."""
    token_read_nbytes: list[int]
    """What the process had read from block devices by then: O_DIRECT reads, page cache fills and mmap faults alike."""
    tokens: list[list[int]]
    """New token ids, shape [batch, new_tokens]."""
    versions: dict[str, str]
    notes: str = ""
    """Anything worth keeping: a plan, a device map."""
    figures: dict[str, float] = field(default_factory=dict)
    """Counts of the contender's own, by name."""

    @property
    def decode_s(self) -> list[float]:
        """Seconds of each token after the first."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    def summary(self) -> dict[str, float]:
        """The figures that the tables show."""
        decode_count = len(self.token_s) - 1
        return {
            "load_s": self.loaded_s,
            "ttft_s": self.token_s[0] - self.loaded_s,
            "ttft_with_load_s": self.token_s[0],
            "s_per_token_mean": statistics.mean(self.decode_s),
            "s_per_token_median": statistics.median(self.decode_s),
            "read_nbytes_per_token": (self.token_read_nbytes[-1] - self.token_read_nbytes[0]) / decode_count,
        }


@dataclass(kw_only=True)
class TokenClock:
    """Stamps every token with time and bytes read. Speaks the streamer protocol of transformers' `generate`."""

    started_s: float = field(default_factory=time.perf_counter)
    """Make the clock right after the imports: this is time zero."""
    loaded_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    token_read_nbytes: list[int] = field(default_factory=list)
    _prompt_seen: bool = False

    def __post_init__(self) -> None:
        if started := os.environ.get(STARTED_VARIABLE):
            Path(started).touch()

    def elapsed_s(self) -> float:
        """Seconds since time zero."""
        return time.perf_counter() - self.started_s

    def mark_loaded(self) -> None:
        """The model is ready; generation starts now."""
        self.loaded_s = self.elapsed_s()

    def mark_token(self) -> None:
        """One more token of every row is known."""
        self.token_s.append(self.elapsed_s())
        self.token_read_nbytes.append(read_nbytes())

    def put(self, value: object) -> None:
        """Streamer protocol: the first call brings the prompt, each later one a token of every row."""
        if self._prompt_seen:
            self.mark_token()
        self._prompt_seen = True

    def end(self) -> None:
        """Streamer protocol: nothing is held back."""

    def report(
        self,
        tokens: list[list[int]],
        versions: dict[str, str],
        notes: str = "",
        figures: dict[str, float] | None = None,
    ) -> None:
        """Print the line of JSON that the harness reads."""
        report = Report(
            loaded_s=self.loaded_s,
            token_s=self.token_s,
            token_read_nbytes=self.token_read_nbytes,
            tokens=tokens,
            versions=versions,
            notes=notes,
            figures=figures or {},
        )
        print(json.dumps(asdict(report)), flush=True)


def read_nbytes() -> int:
    """Bytes that this process has caused to be read from block devices so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def run_transformers(job: Job, clock: TokenClock, load: Callable[[], Any]) -> list[list[int]]:
    """Load with `load` and generate greedily with transformers' own `generate`; the new tokens of each row.

    Shared by every contender that ends up with a transformers model, so that nothing but the loading differs.
    """
    import torch  # llama.cpp's contender must not pay for it

    model = load()
    clock.mark_loaded()
    prompts = torch.tensor(job.prompts())
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=job.new_tokens,
        do_sample=False,
        streamer=clock,
    )
    new_tokens: list[list[int]] = output[:, job.prompt_length :].tolist()
    return new_tokens
