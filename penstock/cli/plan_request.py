"""What a user asked of `penstock plan`, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from ..memory.errors import UsageError
from ..scheduler.sizes import DEFAULT_CONTEXT, Training, Workload
from ..scheduler.stepload import Updates

_OPTIMIZERS: Final = ("adamw", "sgd", "lion")
_SIZES: Final[tuple[Training, ...]] = get_args(Training)
_APART: Final[tuple[tuple[str, str], ...]] = (
    ("--system", "--sizes --target --sweep --max-memory --device --disk --save --profile --throughput --train"),
    ("--sizes", "--target --sweep --hardware --save --profile --workload --throughput"),
    ("--target", "--sweep --hardware --max-memory --device --disk --save --profile"),
    ("--sweep", "--save --profile"),
    ("--hardware", "--device --disk"),
    ("--workload", "--throughput --train"),
    ("--train", "--save --profile --throughput"),
)
"""Options with which others have no meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The machine that is asked about."""

    hardware: str | None
    max_memory: str
    device: str
    disk: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is to be told, and how."""

    target: str | None
    sweep: str | None
    chart: Path | None
    profile: Path | None
    save: Path | None
    force: bool
    as_json: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """Of a step of training, as they were given; None is what the default is.

    Raises:
        UsageError: one has no meaning, or is given where nothing is trained.
    """

    train: str | None
    context: int | None
    rank: int | None
    accumulate: int | None
    clip: bool | None
    updates: str | None
    recompute: bool | None
    lora: str | None

    def check(self, *, sizes: bool) -> None:
        """See that they go together."""
        given = {
            "--context": self.context,
            "--accumulate": self.accumulate,
            "--clip": self.clip,
            "--updates": self.updates,
            "--recompute": self.recompute,
            "--lora": self.lora,
            "--rank": self.rank,
        }
        named = [name for name, value in given.items() if value is not None]
        if sizes:
            if extra := [name for name in named if name not in ("--context", "--rank")]:
                raise UsageError(f"{extra[0]} has no meaning with --sizes: leave one of them out")
            return
        if self.train is None:
            if named:
                raise UsageError(f"{named[0]} is about training: add --train adamw, or for its sizes alone --sizes")
            return
        if self.rank is not None:
            raise UsageError(f"--rank belongs to --sizes: write --lora r={self.rank}")
        if self.train not in _OPTIMIZERS:
            hint = f"--train adamw --lora r={16}" if self.train == "lora" else " or ".join(_OPTIMIZERS)
            raise UsageError(f"--train {self.train!r} is no optimizer: use {hint}")
        if self.updates is not None and self.updates not in get_args(Updates):
            raise UsageError(f"--updates {self.updates!r}: use {' or '.join(get_args(Updates))}")
        if self.updates == "backward" and self.clip is not False:
            raise UsageError("--updates backward begins before all gradients are there, and clipping needs them: "
                             "add --no-clip")  # fmt: skip
        self.adapters()

    def adapters(self) -> tuple[int, tuple[str, ...]] | None:
        """Rank and layers of --lora; None without it.

        Raises:
            UsageError: it cannot be read.
        """
        if self.lora is None:
            return None
        found: dict[str, str] = {}
        for part in self.lora.split(","):
            key, equals, value = part.strip().partition("=")
            if key not in ("r", "targets") or not equals or not value or key in found:
                raise UsageError(
                    f"--lora {self.lora!r}: write for example r=16, or r=16,targets=q_proj+v_proj; what else there is "
                    "to say of adapters does not change what they take"
                )
            found[key] = value
        rank = found.get("r", "")
        if not rank.isdecimal() or not int(rank):
            raise UsageError(f"--lora {self.lora!r}: r is the rank, 1 or more: write for example r=16")
        return int(rank), tuple(found["targets"].split("+")) if "targets" in found else ()

    def sizes(self, batch: int) -> Workload:
        """The workload of --sizes.

        Raises:
            UsageError: there is no such way to train.
        """
        chosen = next((each for each in _SIZES if each == self.train), None)
        if self.train is not None and chosen is None:
            raise UsageError(f"--train {self.train!r} is not a way to train: use {' or '.join(_SIZES)}")
        return Workload(train=chosen, batch=batch, context=self.context or DEFAULT_CONTEXT, rank=self.rank or 16)


def refuse_together(given: Mapping[str, object]) -> None:
    """See that no options were given with which others have no meaning.

    Raises:
        UsageError: some were; the message names two.
    """
    there = {name for name, value in given.items() if value}
    for option, others in _APART:
        clash = [other for other in others.split() if other in there]
        if option in there and clash and not (option == "--sizes" and clash == ["--train"]):
            raise UsageError(f"{option} and {clash[0]} exclude each other: leave one of them out")
