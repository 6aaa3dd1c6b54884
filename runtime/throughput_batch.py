"""One micro-batch: transformers' own `generate` over prompts of like lengths, told apart row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..scheduler.microbatches import MicroBatch, worth_compacting
from .experts.implementation import REPLACED
from .feeding import takes
from .reserved import reserved_cache
from .throughput_choice import Choice

_PLAIN: Final = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "guidance_scale": None,
    "watermarking_config": None,
}
"""Options of generation that look at a whole row, padding included, or count from the start of a call: as they are when
they do nothing."""


@dataclass(kw_only=True, slots=True, eq=False)
class Row:
    """One prompt while it is continued."""

    index: int
    prompt: tuple[int, ...]
    new_tokens: int
    """The most that it may be continued by."""
    choice: Choice | None
    """How its tokens are drawn; None for the likeliest ones."""
    ids: list[int] = field(default_factory=list)
    """Its continuation so far."""
    stopped: bool = False
    """Whether the model has ended it."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.stopped or len(self.ids) >= self.new_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """What a model allows."""

    pads: bool
    """Whether rows of different lengths may share a batch, padded on the left."""
    compacts: bool
    """Whether rows may leave a batch."""
    interleaves: bool
    """Whether several batches may be under way at once."""
    reserves: bool
    """Whether keys and values may lie in buffers that are made once."""


def ways_of(model: Any) -> Ways:
    """What a model, with the generation config it has, allows."""
    config = model.generation_config
    plain = all(getattr(config, name, None) in (None, value) for name, value in _PLAIN.items())
    decoder = not model.config.is_encoder_decoder
    # Some models for images keep the positions of the batch at work on a module. On a GPU, generate switches how
    # transformers' own experts are computed while it decodes, for the model as a whole.
    keeps = any("rope_deltas" in vars(module) for module in model.modules())
    switches = model.device.type not in ("cpu", "meta") and REPLACED in model.get_experts_implementation().values()
    return Ways(
        pads=plain and decoder,
        compacts=plain and decoder,
        interleaves=not keeps and not switches,
        reserves=decoder and takes(model, "past_key_values") and model._supports_default_dynamic_cache(),
    )


class _Recorder(StoppingCriteria):
    """Notes each row's tokens as they come, and ends rows and calls.

    Args:
        on_token: Called after each step, with the rows that got a token in it.
    """

    def __init__(
        self, rows: Sequence[Row], ends: frozenset[int], on_step: Callable[[list[Row]], None], *, compacts: bool
    ) -> None:
        self._rows = rows
        self._ends = ends
        self._on_step = on_step
        self._compacts = compacts

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended [rows]; all of them where the call is to end."""
        running = [(row, token) for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True)]
        running = [(row, token) for row, token in running if not row.ended]
        for row, token in running:
            row.ids.append(token)
            row.stopped = token in self._ends
        self._on_step([row for row, _ in running])
        live = [row for row in self._rows if not row.ended]
        left = max((row.new_tokens - len(row.ids) for row in live), default=0)
        compact = self._compacts and worth_compacting(live=len(live), rows=len(self._rows), steps_left=left)
        ended = [compact or row.ended for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class _Drawing:
    """Leaves one token to choose in each row: the one that the row's own random numbers draw."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] → the same with one finite element per row."""
        drawn = torch.full_like(scores, float("-inf"))
        for number, row in enumerate(self._rows):
            if row.choice is not None and not row.ended:
                drawn[number, row.choice.draw(scores[number])] = 0.0
            else:
                drawn[number, 0] = 0.0
        return drawn


def run_batch(
    model: Any, batch: MicroBatch, rows: Sequence[Row], ways: Ways, on_step: Callable[[list[Row]], None]
) -> None:
    """Continue all rows to their ends; `on_step` is told after each token."""
    config = model.generation_config
    ends = _token_set(config.eos_token_id)
    pad = next(iter(_token_set(config.pad_token_id) or sorted(ends) or [0]))
    ids, mask = _padded(rows, pad, model.device)
    longest = max(row.new_tokens for row in rows) + ids.shape[1]
    cache: Any = reserved_cache(model.config, longest) if ways.reserves else None
    chunk = batch.chunk
    live = list(rows)
    while live:
        recorder = _Recorder(live, ends, on_step, compacts=ways.compacts)
        processors = LogitsProcessorList([_Drawing(live)] if live[0].choice is not None else [])
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([recorder]),
            max_new_tokens=max(row.new_tokens - len(row.ids) for row in live),
            prefill_chunk_size=chunk,
            pad_token_id=pad,
            do_sample=False,  # where tokens are drawn, `_Drawing` has done it
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            cache_implementation=None,
            return_dict_in_generate=True,
            output_scores=False,
            output_logits=False,
            disable_compile=True,
        )
        kept = [number for number, row in enumerate(live) if not row.ended]
        if not kept:
            return
        cache, chunk = found.past_key_values, None
        chosen = torch.tensor(kept, device=ids.device)
        cache.batch_select_indices(torch.tensor(kept))  # some of its layers may lie in host memory
        ids = found.sequences[chosen]
        grown = ids.shape[1] - mask.shape[1]
        mask = torch.cat([mask[chosen], mask.new_ones(len(kept), grown)], dim=1)
        live = [live[number] for number in kept]


def _padded(rows: Sequence[Row], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, padded on the left, and where they are: both [rows, tokens of the longest]."""
    longest = max(len(row.prompt) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[number, longest - len(row.prompt) :] = 1
    return ids.to(device), mask.to(device)


def _token_set(value: Any) -> frozenset[int]:
    """A token id, or several, or none, as a config has them."""
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list | tuple) else frozenset([int(value)])
