"""What `--lora r=16,alpha=32,targets=q_proj+v_proj` says, read before anything slow is imported."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Final

from ..memory.errors import UsageError

ALL: Final = "all-linear"
"""PEFT's word for all linear layers but the output layer."""
_KEYS: Final = ("r", "alpha", "dropout", "targets", "rslora")
_EXAMPLE: Final = "write for example r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOption:
    """Adapters, as far as the command line has words for them."""

    r: int = 16
    """Rank."""
    alpha: int
    """What they add is multiplied by alpha / r; twice the rank where it is not given."""
    dropout: float = 0.0
    """Of what goes into them."""
    targets: tuple[str, ...] = (ALL,)
    """Ends of the names of the modules that get one each."""
    rslora: bool = False
    """Multiply by alpha / √r instead (Kalajdzievski, 2023)."""

    @property
    def names(self) -> tuple[str, ...]:
        """`targets`, or none where all linear layers are meant."""
        return () if self.targets == (ALL,) else self.targets

    def settings(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.names) or ALL,
            "use_rslora": self.rslora,
            "task_type": "CAUSAL_LM",
        }

    def __str__(self) -> str:
        text = f"r={self.r},alpha={self.alpha},dropout={self.dropout:g},targets={'+'.join(self.targets)}"
        return text + (",rslora=true" if self.rslora else "")


def parse_lora(text: str) -> LoraOption:
    """Read the option.

    Raises:
        UsageError: it has no meaning.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise UsageError(f"--lora {text!r}: {part!r} is no key=value; {_EXAMPLE}")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? It has" if close else "it has"
            raise UsageError(f"--lora has no key {key!r}: {hint} {', '.join(_KEYS)}")
        if key in given:
            raise UsageError(f"--lora {text!r} gives {key} twice: give it once")
        given[key] = value
    r = _whole("r", given.get("r", "16"))
    return LoraOption(
        r=r,
        alpha=_whole("alpha", given["alpha"]) if "alpha" in given else 2 * r,
        dropout=_share(given.get("dropout", "0")),
        targets=_targets(given.get("targets", ALL)),
        rslora=_truth("rslora", given.get("rslora", "false")),
    )


def _whole(key: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UsageError(f"--lora {key}={text} is no whole number above 0; {_EXAMPLE}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UsageError(f"--lora dropout={text} is no share from 0 to below 1; {_EXAMPLE}")
    return value


def _targets(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split("+"))
    if not all(found) or (ALL in found and len(found) > 1):
        raise UsageError(f"--lora targets={text}: give names of modules with + between them, or {ALL}; {_EXAMPLE}")
    return found


def _truth(key: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"--lora {key}={text}: give true or false")
    return text == "true"
