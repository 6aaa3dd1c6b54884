"""What a user asked of `penstock plan`, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from ..budget import parse_budget
from ..memory.errors import UsageError
from ..scheduler.sizes import DEFAULT_CONTEXT, Training, Workload
from ..scheduler.stepload import Updates
from .lora_option import LoraOption, parse_lora

OPTIMIZERS: Final = ("adamw", "sgd", "lion")
LORA: Final = "lora"
"""In the place of an optimizer: adamw on adapters."""
SYSTEM: Final = "penstock"
"""Whose schedule is simulated, unless `--system` says otherwise."""
PROMPT: Final = 128
GENERATE: Final = 128
TOP: Final = 8
_SIZES: Final[tuple[Training, ...]] = get_args(Training)
_APART: Final[Mapping[str, str]] = {
    "--system": "--sizes --target --sweep --chart --max-memory --device --disk --save --profile --throughput --train "
    "--prompt --generate --batch --context --accumulate --clip --updates --recompute --lora --rank --top --dtype "
    "--trust-remote-code --force --routing",
    "--sizes": "--target --sweep --hardware --save --profile --workload --throughput --prompt --generate --accumulate "
    "--clip --updates --recompute --routing",
    "--target": "--sweep --hardware --max-memory --device --disk --save --profile",
    "--sweep": "--save --profile",
    "--hardware": "--device --disk",
    "--workload": "--throughput --train --prompt --generate --batch",
    "--throughput": "--batch",
    "--train": "--save --profile --throughput --prompt --generate --routing",
    "--lora": "--rank",
}
"""Options with which others have no meaning."""
_WHICH: Final[Mapping[tuple[str, str], str]] = {
    ("--throughput", "--batch"): "the first chooses the batch, leave --batch out",
}
"""What to do about two of them, where it is known which one to leave out."""
_TRAINING: Final = "--context --accumulate --clip --updates --recompute --lora --rank"
_NEEDS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(_TRAINING.split(), ("--train --sizes", "is about training: add --train adamw, or for its sizes "
                                                            "alone --sizes")),
    "--chart": ("--sweep", "draws a sweep: add for example --sweep host=16GiB:128GiB"),
    "--top": ("--sizes", "says how many modules --sizes shows: add --sizes"),
    "--force": ("--save --profile --chart", "replaces files, and none is written: leave it out"),
}  # fmt: skip
"""Options that have a meaning only with one of others, and what to say where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The machine that is asked about."""

    hardware: str | None
    max_memory: str
    device: str
    disk: Path | None

    def given(self) -> dict[str, bool]:
        """Which of its options were."""
        return {
            "--hardware": self.hardware is not None,
            "--max-memory": self.max_memory != "auto",
            "--device": self.device != "auto",
            "--disk": self.disk is not None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is to be told, and how."""

    sizes: bool
    target: str | None
    sweep: str | None
    chart: Path | None
    profile: Path | None
    save: Path | None
    top: int | None
    force: bool
    as_json: bool

    def given(self) -> dict[str, bool]:
        """Which of its options were."""
        return {
            "--sizes": self.sizes,
            "--target": self.target is not None,
            "--sweep": self.sweep is not None,
            "--chart": self.chart is not None,
            "--profile": self.profile is not None,
            "--save": self.save is not None,
            "--top": self.top is not None,
            "--force": self.force,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Of a run, as they were given; None is what the default is."""

    prompt: int | None
    generate: int | None
    batch: int | None
    """Also of a backward pass, where something is trained."""
    throughput: bool
    workload: Path | None
    routing: Path | None = None
    """A trace."""

    def given(self) -> dict[str, bool]:
        """Which of them were."""
        return {
            "--prompt": self.prompt is not None,
            "--generate": self.generate is not None,
            "--batch": self.batch is not None,
            "--throughput": self.throughput,
            "--workload": self.workload is not None,
            "--routing": self.routing is not None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """Of a step of training, as they were given; None is what the default is."""

    train: str | None
    context: int | None
    rank: int | None
    accumulate: int | None
    clip: bool | None
    updates: str | None
    recompute: bool | None
    lora: str | None

    def given(self) -> dict[str, bool]:
        """Which of them were."""
        return {
            "--train": self.train is not None,
            "--context": self.context is not None,
            "--rank": self.rank is not None,
            "--accumulate": self.accumulate is not None,
            "--clip": self.clip is not None,
            "--updates": self.updates is not None,
            "--recompute": self.recompute is not None,
            "--lora": self.lora is not None,
        }

    @property
    def optimizer(self) -> str:
        """Its name, where something is trained."""
        assert self.train is not None
        return "adamw" if self.train == LORA else self.train

    def check(self) -> None:
        """See that a step of training is described.

        Raises:
            UsageError: an option has no meaning.
        """
        if self.rank is not None:
            raise UsageError(f"--rank belongs to --sizes: write --lora r={self.rank}")
        if self.train not in (*OPTIMIZERS, LORA):
            raise UsageError(f"--train {self.train!r} is no optimizer: use {', '.join(OPTIMIZERS)} or {LORA}")
        if self.updates is not None and self.updates not in get_args(Updates):
            raise UsageError(f"--updates {self.updates!r}: use {' or '.join(get_args(Updates))}")
        if self.updates == "backward" and self.clip is not False:
            raise UsageError("--updates backward begins before all gradients are there, and clipping needs them: "
                             "add --no-clip")  # fmt: skip
        if self.adapters() is not None and self.updates == "backward":
            raise UsageError(
                "--updates backward makes room for gradients of weights that stream, and those of adapters stay in "
                "memory: leave it out"
            )

    def adapters(self) -> LoraOption | None:
        """What is trained in the place of the weights, if that is so.

        Raises:
            UsageError: --lora cannot be read.
        """
        if self.lora is None and self.train != LORA:
            return None
        return parse_lora(self.lora or "r=16")

    def sizes(self, batch: int) -> Workload:
        """The workload of --sizes.

        Raises:
            UsageError: there is no such way to train.
        """
        chosen = next((each for each in _SIZES if each == self.train), None)
        if self.train is not None and chosen is None:
            raise UsageError(f"--train {self.train!r} is not a way to train: use {' or '.join(_SIZES)}")
        context = self.context or DEFAULT_CONTEXT
        if self.lora is None:
            return Workload(train=chosen, batch=batch, context=context, rank=self.rank or 16)
        given = parse_lora(self.lora)
        return Workload(
            train="lora", batch=batch, context=context, rank=given.r, targets=given.names, dropout=given.dropout
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """One `penstock plan`.

    Raises:
        UsageError: an option has no meaning, or none beside another one; or no system has the name.
    """

    checkpoint: str | None
    model: str | None
    system: str
    run: RunOptions
    training: TrainingOptions
    answer: Answer
    where: Where
    dtype: str
    trust_remote_code: bool

    @property
    def source(self) -> str:
        """The model."""
        return self.checkpoint if self.checkpoint is not None else str(self.model)

    def __post_init__(self) -> None:
        given = {
            "--system": self.system != SYSTEM,
            "--dtype": self.dtype != "auto",
            "--trust-remote-code": self.trust_remote_code,
            **self.run.given(),
            **self.training.given(),
            **self.answer.given(),
            **self.where.given(),
        }
        if self.system != SYSTEM:
            from ..scheduler.systems import system  # all their schedules, which nobody else needs

            system(self.system)  # a name that is misspelt comes before what has no meaning beside it
        refuse_together(given)
        if (self.checkpoint is not None) and (self.model is not None):
            raise UsageError("CKPT and --model exclude each other: leave one of them out")
        if self.system != SYSTEM:
            return
        if self.checkpoint is None and self.model is None:
            raise UsageError("give CKPT, a folder with a config.json or a Hub id; or a config.json by --model")
        if self.training.train is not None and not self.answer.sizes:
            self.training.check()
        self._check_sweep()

    def _check_sweep(self) -> None:
        """See that nothing is named that is to take several values."""
        swept, budget = (self.answer.sweep or "").partition("=")[0], parse_budget(self.where.max_memory)
        named = {
            "batch": self.run.batch is not None or self.run.throughput,
            "host": budget.host is not None,
            "device": budget.device is not None,
        }
        if named.get(swept):
            option = "--batch or --throughput" if swept == "batch" else f"{swept}= in --max-memory"
            raise UsageError(f"--sweep {swept}=… tries several values of what {option} names: leave one of them out")


def refuse_together(given: Mapping[str, bool]) -> None:
    """See that no options were given with which others have no meaning, or without what they belong to.

    Args:
        given: By option: whether it was.

    Raises:
        UsageError: some were; the message names two.
    """
    there = {name for name, value in given.items() if value}
    for option, others in _APART.items():
        clash = [other for other in others.split() if other in there]
        if option in there and clash:
            remedy = _WHICH.get((option, clash[0]), "leave one of them out")
            raise UsageError(f"{option} and {clash[0]} exclude each other: {remedy}")
    for option, (others, words) in _NEEDS.items():
        if option in there and not there.intersection(others.split()):
            raise UsageError(f"{option} {words}")
