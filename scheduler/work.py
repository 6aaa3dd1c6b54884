"""What is asked of a machine: a workload file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..memory.errors import UsageError
from .section import Section

Kind = Literal["run", "batch", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sequences that are to be generated, or trained on."""

    kind: Kind = "run"
    """run: one answer at a time. batch: many at once, for throughput. finetune: optimizer steps."""
    prompt: int = 512
    """Tokens that are given."""
    generate: int = 32
    """Tokens that are asked for."""
    batch: int = 1
    """Sequences at once, on all devices together."""
    context: int = 1024
    """finetune: tokens per sequence. Otherwise what a cache is made for; prompt + generate is enough."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Settings of the system that carries it out, with that system's own names."""

    @property
    def tokens(self) -> int:
        """Of all sequences in one step of training."""
        return self.batch * self.context


def read_work(file: Path) -> Work:
    """A workload from its file.

    Raises:
        UsageError: it cannot be read, is not JSON, or asks for something that has no meaning.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}): give a workload file") from error
    except ValueError as error:
        raise UsageError(f"{file}: is not JSON ({error})") from error
    return parse_work(data, where=str(file))


def parse_work(data: Any, *, where: str) -> Work:
    """A workload from what such a file holds; `where` names it in errors.

    Raises:
        UsageError: as of `read_work`.
    """
    top = Section(data, where=where, path="")
    said = top.value("kind", "run")
    kind = next((each for each in get_args(Kind) if each == said), None)
    if kind is None:
        raise top.error("kind", said, f"one of {', '.join(get_args(Kind))}")
    prompt = top.whole("prompt", 1, 10_000_000, "tokens", 512)
    generate = top.whole("generate", 1, 10_000_000, "tokens", 32)
    batch = top.whole("batch", 1, 1_000_000, "sequences", 1)
    context = top.whole("context", 1, 10_000_000, "tokens", 1024 if kind == "finetune" else prompt + generate)
    policy = top.value("policy", {})
    if not isinstance(policy, dict):
        raise top.error("policy", policy, "an object with the system's settings")
    top.done()
    if kind != "finetune" and context < prompt + generate:
        raise top.error("context", context, f"at least prompt + generate, which are {prompt + generate} tokens")
    return Work(kind=kind, prompt=prompt, generate=generate, batch=batch, context=context, policy=policy)
