"""Whether a call of a model is a prompt or a token, from what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from ...scheduler.experts.shape import Routing
from ...scheduler.experts.trace import Phase

_NAMES: Final = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOf:
    """One root call."""

    number: int
    sequences: int | None
    """How many it is of; None where it was given nothing that says so."""

    def phase(self, tokens: int, routing: Routing) -> Phase:
        """What it is: a token of every sequence, or a few as where guesses are verified, or a prompt.

        What would use all experts of a layer if its tokens had none in common counts as a prompt.
        """
        most = max(routing.experts // routing.top_k, self.sequences or 1)
        return "prefill" if tokens > most else "decode"


def step_of(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepOf:
    """A root call by its arguments: ids [B, S] or states [B, S, H] by name, else the first argument of such a shape."""
    named = [kwargs[name] for name in _NAMES if isinstance(kwargs.get(name), torch.Tensor)]
    for value in (*named, *args):
        if isinstance(value, torch.Tensor) and value.dim() in (2, 3):
            return StepOf(number=number, sequences=value.shape[0])
    return StepOf(number=number, sequences=None)
