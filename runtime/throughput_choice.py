"""How a token is drawn: from one row's scores, with random numbers that belong to its prompt alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..memory.errors import UsageError

_NO_IDS: Any = None
"""None of the warpers here looks at the row so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; the likeliest where the temperature is None or zero."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature} has no meaning: give 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} has no meaning: give a share of the probability, above 0 and up to 1")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k} has no meaning: give 1 or more")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return not self.temperature


class Choice:
    """Draws the tokens of one prompt. What it draws depends on the seed, the prompt's index and the scores only, not on
    who else is in the batch."""

    def __init__(self, warpers: LogitsProcessorList, *, seed: int, index: int) -> None:
        self._warpers = warpers
        self._random = random.Random(f"{seed}/{index}")

    def draw(self, scores: torch.Tensor) -> int:
        """The next token, from scores [vocabulary]: the first at which the summed probability passes a random
        number."""
        warped: torch.Tensor = self._warpers(_NO_IDS, scores[None])[0]
        summed = torch.softmax(warped.double(), dim=-1).cumsum(dim=-1)
        wanted = self._random.random() * summed[-1]
        return int(torch.searchsorted(summed, wanted, right=True).clamp(max=len(scores) - 1))


def warpers_for(sampling: Sampling, config: Any) -> LogitsProcessorList:
    """Temperature, then top-k, then top-p, as `generate` applies them; what is not named is the generation config's."""
    assert sampling.temperature
    top_k = sampling.top_k if sampling.top_k is not None else getattr(config, "top_k", None)
    top_p = sampling.top_p if sampling.top_p is not None else getattr(config, "top_p", None)
    found = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if top_k is None:
        top_k = 50  # transformers' own default
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found
