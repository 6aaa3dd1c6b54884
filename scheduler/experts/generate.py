"""Makes a trace from a recipe, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .recipe import Recipe
from .trace import PHASES, IntArray, Trace, TraceHeader

_Floats = npt.NDArray[np.float32]


def generate_trace(recipe: Recipe) -> Trace:
    """The trace of a recipe."""
    routing, width, k = recipe.routing, recipe.width, recipe.routing.top_k
    requests, positions, phases, lengths = _steps(recipe)
    tokens = len(requests)
    # Each layer draws from a stream of its own: a recipe with more layers has the same first ones.
    words_seed, *layer_seeds = np.random.SeedSequence(recipe.seed).spawn(1 + routing.layers)
    words = _words(recipe, np.random.default_rng(words_seed))
    experts = np.empty((routing.layers, tokens, width), np.uint16)
    scores = np.empty((routing.layers, tokens, width), np.float16)
    guesses = np.full((routing.layers, tokens, k), routing.experts, np.uint16)
    for layer, seed in enumerate(layer_seeds):
        random = np.random.default_rng(seed)
        logits = _logits(recipe, random, words)[requests, positions]
        experts[layer], scores[layer] = _chosen(logits, width)
        if layer:  # nothing is above the first
            noise = random.standard_normal(logits.shape, np.float32)
            guesses[layer] = _highest(logits + recipe.guess_noise * noise, k)
    return Trace(
        header=TraceHeader(
            routing=routing, width=width, source=recipe.says, scored=True, guessed=True, expert=recipe.expert
        ),
        phases=phases,
        begins=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        requests=requests.astype(np.uint32),
        experts=experts,
        scores=scores,
        guesses=guesses,
    )


def _steps(recipe: Recipe) -> tuple[IntArray, IntArray, npt.NDArray[np.uint8], list[int]]:
    """By token: its sequence, and its place there. By step: phase and number of tokens."""
    requests: list[Any] = []
    positions: list[Any] = []
    phases: list[int] = []
    lengths: list[int] = []
    for first in range(0, recipe.requests, recipe.batch):
        group = np.arange(first, min(first + recipe.batch, recipe.requests))
        if recipe.prompt:
            requests.append(np.repeat(group, recipe.prompt))
            positions.append(np.tile(np.arange(recipe.prompt), len(group)))
            phases.append(PHASES.index("prefill"))
            lengths.append(len(group) * recipe.prompt)
        requests.append(np.tile(group, recipe.generate))
        positions.append(recipe.prompt + np.repeat(np.arange(recipe.generate), len(group)))
        phases += [PHASES.index("decode")] * recipe.generate
        lengths += [len(group)] * recipe.generate
    return np.concatenate(requests), np.concatenate(positions), np.array(phases, np.uint8), lengths


def _words(recipe: Recipe, random: np.random.Generator) -> IntArray:
    """[requests, positions] The words of the sequences."""
    often = np.arange(1, recipe.vocabulary + 1, dtype=np.float64) ** -recipe.vocabulary_zipf
    shape = (recipe.requests, recipe.prompt + recipe.generate)
    return random.choice(recipe.vocabulary, size=shape, p=often / often.sum())


def _logits(recipe: Recipe, random: np.random.Generator, words: IntArray) -> _Floats:
    """[requests, positions, experts] Of one layer."""
    experts = recipe.routing.experts
    count, length = words.shape
    skew = -recipe.zipf * np.log(np.arange(1, experts + 1, dtype=np.float32))
    logits: _Floats = np.broadcast_to(random.permutation(skew), (count, length, experts)).copy()
    logits += recipe.topic * random.standard_normal((count, 1, experts), np.float32)
    if recipe.context:
        rest = np.float32(np.sqrt(1 - recipe.persistence**2))
        state = random.standard_normal((count, experts), np.float32)
        for position in range(length):
            logits[:, position] += recipe.context * state
            state = recipe.persistence * state + rest * random.standard_normal((count, experts), np.float32)
    if recipe.token:
        logits += (recipe.token * random.standard_normal((recipe.vocabulary, experts), np.float32))[words]
    return logits


def _chosen(logits: _Floats, width: int) -> tuple[IntArray, _Floats]:
    """The candidates, the best first, with their share of what the gate gives to all."""
    highest = _highest(logits, width)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    found = np.take_along_axis(exponents, highest, axis=1) / exponents.sum(axis=1, keepdims=True)
    return highest, found


def _highest(logits: _Floats, count: int) -> IntArray:
    """The best first."""
    experts = logits.shape[1]
    some = np.argpartition(-logits, min(count, experts - 1), axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
