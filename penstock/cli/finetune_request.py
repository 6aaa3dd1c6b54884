"""What a user asked of `penstock finetune`, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..budget import parse_budget
from ..memory.errors import UsageError
from .lora_option import LoraOption

OPTIMIZERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "adamw": {"lr": 1e-5, "betas": (0.9, 0.999), "weight_decay": 0.01},
    "lion": {"lr": 1e-6, "betas": (0.9, 0.99), "weight_decay": 0.01},
    "sgd": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
}
"""The hyperparameters that each has an option for, and what they are where it is not given."""
LORA_LR: Final = 10
"""Times as large is the learning rate of adapters, where it is not given: they begin as nothing."""
SCHEDULES: Final = ("constant", "linear", "cosine")
TOO_LONG: Final = ("truncate", "leave-out", "refuse")
NONFINITE: Final = ("raise", "skip")
ACTIVATIONS: Final = ("auto", "keep", "recompute", "offload")
DECAY_ALL: Final = "none"
"""For --no-decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the results of a run, beside the checkpoint and the data.

    Raises:
        UsageError: an option has no meaning.
    """

    steps: int | None
    epochs: float | None
    """One of the two, or none: then it is one epoch."""
    batch: int
    accumulate: int
    seq: int | None
    optimizer: str
    lr: float | None
    schedule: str
    warmup: float
    """Steps, or a share of all steps where it is below 1."""
    weight_decay: float | None
    no_decay: str | None
    """Name patterns with commas between them; None for norms and biases."""
    betas: str | None
    momentum: float | None
    clip: float
    """0 for none."""
    nonfinite: str
    seed: int
    eval_fraction: float
    too_long: str
    dtype: str
    lora: LoraOption | None = None
    """Adapters to train; None to train all weights."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other: give one of them")
        for option, value, known in (
            ("--optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("--schedule", self.schedule, SCHEDULES),
            ("--too-long", self.too_long, TOO_LONG),
            ("--nonfinite", self.nonfinite, NONFINITE),
        ):
            if value not in known:
                raise UsageError(f"there is no {option} {value!r}: give {', '.join(known)}")
        if self.epochs is not None and not self.epochs > 0:
            raise UsageError(f"--epochs {self.epochs:g} has no meaning: give a number above 0")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UsageError(f"--warmup {self.warmup:g} is neither whole steps nor a share of them below 1")
        if not self.eval_fraction < 1:
            raise UsageError(f"--eval-fraction {self.eval_fraction:g} leaves nothing to train on: give a share below 1")
        self.hyperparameters()

    def hyperparameters(self) -> dict[str, Any]:
        """Of the optimizer, with its defaults filled in.

        Raises:
            UsageError: one was given that it has not.
        """
        found = dict(OPTIMIZERS[self.optimizer])
        if self.lora is not None:
            found["lr"] *= LORA_LR
        given = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": None if self.betas is None else _parse_betas(self.betas),
            "momentum": self.momentum,
        }
        for name, value in given.items():
            if value is not None and name not in found:
                raise UsageError(
                    f"--{name} is no option of {self.optimizer}: leave it out, or choose another optimizer"
                )
            if value is not None:
                found[name] = value
        return found

    def warmup_steps(self, steps: int) -> int:
        """Of a run of so many."""
        return int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)

    def settings(self, *, checkpoint: str, seq: int, steps: int) -> dict[str, Any]:
        """For the commits: a run that goes on must be given the same. How long it is may change where nothing follows
        from it."""
        found: dict[str, Any] = {"checkpoint": checkpoint, "seq": seq, "warmup": self.warmup_steps(steps)}
        for name in ("batch", "accumulate", "optimizer", "schedule", "no_decay", "clip", "nonfinite", "seed"):
            found[name.replace("_", "-")] = getattr(self, name)
        for name, value in self.hyperparameters().items():
            found[name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
        found |= {"eval-fraction": self.eval_fraction, "too-long": self.too_long, "dtype": self.dtype}
        if self.lora is not None:
            found["lora"] = str(self.lora)
        return found if self.schedule == "constant" else {**found, "steps": steps}


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRequest:
    """One `penstock finetune`."""

    checkpoint: str
    """A folder or a Hub id."""
    data: Path
    out: Path
    """The run's folder."""
    recipe: Recipe
    eval_every: int | None
    commit_every: int
    commit_minutes: float | None = None
    """Commits are this far apart, at most, if steps are not longer."""
    activations: str = "auto"
    """Where they are until backward: results do not depend on it, so a run may go on with another."""
    resume: bool
    force: bool
    max_memory: str
    device: str
    trust_remote_code: bool
    as_json: bool

    def __post_init__(self) -> None:
        parse_budget(self.max_memory)  # raises before the slow imports rather than after
        if self.activations not in ACTIVATIONS:
            raise UsageError(f"there is no --activations {self.activations!r}: give {', '.join(ACTIVATIONS)}")
        if self.resume and self.force:
            raise UsageError("--resume goes on with a run and --force takes it away: give one of them")
        if self.eval_every is not None and not self.recipe.eval_fraction:
            raise UsageError("--eval-every needs something to evaluate on: set it aside with --eval-fraction 0.02")
        if self.commit_minutes is not None and not self.commit_minutes > 0:
            raise UsageError(f"--commit-minutes {self.commit_minutes:g} has no meaning: give a number above 0")
        if not self.data.exists():
            raise UsageError(f"--data {self.data}: there is no such file")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is no folder: name one for the run")


def _parse_betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--betas {text!r} is not two numbers: write for example 0.9,0.95") from error
    return first, second
