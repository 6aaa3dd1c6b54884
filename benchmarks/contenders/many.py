"""Many prompts of different lengths: what every contender of the throughput benchmark is asked, and what it reports."""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .protocol import FIRST_PROMPT_ID, STARTED_VARIABLE

SHORTEST, LONGEST = 32, 128
"""Tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class ManyJob:
    """One run: this many greedy tokens for each of these prompts."""

    checkpoint: Path
    scratch: Path
    cap_nbytes: int
    first: int
    """Number of the first prompt to run."""
    count: int
    """Prompts to run, from there on."""
    batch: int
    """Prompts per batch, for contenders that must be told."""
    new_tokens: int

    def command_line(self) -> list[str]:
        """The arguments from which `parse_many` makes an equal job."""
        return [text for name, value in asdict(self).items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def prompts(self) -> list[list[int]]:
        """Token ids; each prompt is fixed by its number."""
        vocabulary = range(FIRST_PROMPT_ID, json.loads((self.checkpoint / "config.json").read_text())["vocab_size"])
        draws = (random.Random(number) for number in range(self.first, self.first + self.count))
        return [draw.choices(vocabulary, k=draw.randint(SHORTEST, LONGEST)) for draw in draws]

    def batches(self) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        """Prompts padded on the left, of like lengths, the longest first, and their masks."""
        prompts = sorted(self.prompts(), key=len, reverse=True)
        for start in range(0, len(prompts), self.batch):
            rows = prompts[start : start + self.batch]
            width = len(rows[0])
            yield (
                [[0] * (width - len(row)) + row for row in rows],
                [[0] * (width - len(row)) + [1] * len(row) for row in rows],
            )


def parse_many() -> ManyJob:
    """The job on this process's command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("checkpoint", "scratch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("cap-nbytes", "first", "count", "batch", "new-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return ManyJob(**vars(parser.parse_args()))


@dataclass(frozen=True, kw_only=True)
class ManyReport:
    """What a contender saw. Seconds since the model was loaded."""

    tokens: int
    """New tokens of all prompts."""
    seconds: float
    sweeps: int = 0
    """Passes over the weights; 0 where nothing counts them."""
    sequences_nbytes: int = 0
    """What was set aside for keys, values and activations."""
    rows: int = 1
    """Prompts of the largest batch."""
    notes: str = ""


class ManyClock:
    """Times the work after loading. Make it right after the imports."""

    def __init__(self) -> None:
        if started := os.environ.get(STARTED_VARIABLE):
            Path(started).touch()
        self._began_s = 0.0

    def loaded(self) -> None:
        """The model is ready: work begins now."""
        self._began_s = time.perf_counter()

    def report(
        self, tokens: int, *, sweeps: int = 0, sequences_nbytes: int = 0, rows: int = 1, notes: str = ""
    ) -> None:
        """Print the line of JSON that the harness reads."""
        found = ManyReport(
            tokens=tokens,
            seconds=time.perf_counter() - self._began_s,
            sweeps=sweeps,
            sequences_nbytes=sequences_nbytes,
            rows=rows,
            notes=notes,
        )
        print(json.dumps(asdict(found)), flush=True)
