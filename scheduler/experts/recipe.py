"""Made-up routing that is like that of real models in what caches depend on: skew, topics, drift, and the tokens' own.

A gate's logit for an expert is a sum:

    −zipf · ln(rank)      some experts are liked by all tokens; ranks are drawn anew in each layer
    + topic · N(0, 1)     drawn once per sequence
    + context · x_t       x_t = persistence · x_(t−1) + √(1 − persistence²) · N(0, 1): what a passage is about, drifting
    + token · N(0, 1)     drawn once per word of the vocabulary: the same word goes the same way

and a token chooses the K highest. Strong skew is what counts of uses predict, strong context with much persistence what
recency predicts, and strong token identity is what nothing predicts but the next word.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ...memory.errors import UsageError
from .shape import ExpertShape, Routing


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a trace; the same recipe makes the same trace."""

    routing: Routing
    expert: ExpertShape | None = None
    """For seconds; None where only hits are asked for."""
    seed: int = 0
    requests: int = 8
    """Sequences, one group of `batch` after the other."""
    batch: int = 1
    """Sequences that run together."""
    prompt: int = 64
    """Tokens of a prompt, which are one step; 0 for none."""
    generate: int = 192
    """Tokens that follow, each a step."""
    zipf: float = 0.6
    topic: float = 0.4
    context: float = 0.5
    persistence: float = 0.9
    token: float = 1.0
    vocabulary: int = 1000
    vocabulary_zipf: float = 1.0
    """Exponent of how often words come."""
    runners_up: int = -1
    """Candidates that are kept besides the K chosen ones; -1 for K more, where there are as many."""
    guess_noise: float = 0.5
    """Standard deviation of what is added to logits where a layer's gate is asked one layer early."""

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, float, float], ...] = (
            ("seed", self.seed, 0, 2**63),
            ("requests", self.requests, 1, 1e6),
            ("batch", self.batch, 1, 1e5),
            ("prompt", self.prompt, 0, 1e6),
            ("generate", self.generate, 0, 1e7),
            ("zipf", self.zipf, 0, 10),
            ("topic", self.topic, 0, 100),
            ("context", self.context, 0, 100),
            ("persistence", self.persistence, 0, 0.9999),
            ("token", self.token, 0, 100),
            ("vocabulary", self.vocabulary, 1, 1e6),
            ("vocabulary_zipf", self.vocabulary_zipf, 0, 10),
            ("runners_up", self.runners_up, -1, self.routing.experts - self.routing.top_k),
            ("guess_noise", self.guess_noise, 0, 100),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise UsageError(f"{name.replace('_', '-')} is {value:g}: it must be between {low:g} and {high:g}")
        if self.prompt + self.generate == 0:
            raise UsageError("sequences of no prompt and no generated tokens: one of the two must be 1 or more")
        if self.tokens * self.routing.layers * self.width > MOST_CHOICES:
            raise UsageError(
                f"{self.tokens} tokens of {self.routing.layers} layers and {self.width} candidates are more than "
                f"{MOST_CHOICES:.0e} choices: ask for fewer requests, shorter ones, or fewer layers"
            )

    @property
    def width(self) -> int:
        """Candidates that are kept of a token."""
        k, experts = self.routing.top_k, self.routing.experts
        return min(2 * k, experts) if self.runners_up < 0 else k + self.runners_up

    @property
    def tokens(self) -> int:
        """Of the whole trace."""
        return self.requests * (self.prompt + self.generate)

    @property
    def says(self) -> str:
        """For people."""
        return (
            f"generated: seed {self.seed}, {self.requests} requests of {self.prompt} + {self.generate} tokens, batch "
            f"{self.batch}; zipf {self.zipf:g}, topic {self.topic:g}, context {self.context:g}, persistence "
            f"{self.persistence:g}, token {self.token:g}, vocabulary {self.vocabulary}"
        )


MOST_CHOICES: Final = 4e8
"""Of a trace that is made in memory."""
