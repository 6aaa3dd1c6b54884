"""From prompts to a run: what is checked before anything slow, and the choice of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..memory.errors import ClosedError, UsageError
from ..scheduler.microbatches import MEMORY_RATE, MOST_LANES, Job, Machine, Schedule, schedule
from .build import Machinery
from .handle import Handle
from .throughput import Work
from .throughput_batch import Row, Ways, ways_of
from .throughput_choice import Choice, Sampling, warpers_for
from .throughput_sizes import footprint_of, free_host_nbytes

_DEVICE_MEMORY_RATE: Final = 1e12
"""Bytes per second at which a GPU reads its own memory, roughly; it only ranks choices."""


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> None:
    """Refuse what `generate` would fail at hours later.

    Raises:
        UsageError: the model does not continue texts; or a prompt is empty, has a token that the model does not know,
            or is too long for it. The message names the prompt by its index.
    """
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise UsageError(f"a {type(model).__name__} does not continue texts")
    text = model.config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    longest = getattr(text, "max_position_embeddings", None)
    if model.config.is_encoder_decoder:
        longest = None
    for index, (ids, count) in enumerate(zip(prompts, new_tokens, strict=True)):
        if not ids:
            raise UsageError(f"prompt {index} has no tokens: give a longer text, or leave it out")
        if count < 1:
            raise UsageError(f"prompt {index}: {count} new tokens have no meaning; give 1 or more")
        wrong = next((t for t in ids if t < 0 or (isinstance(vocabulary, int) and t >= vocabulary)), None)
        if wrong is not None:
            raise UsageError(f"prompt {index} has the token {wrong}; the model knows 0 to {(vocabulary or 0) - 1}")
        if isinstance(longest, int) and len(ids) + count > longest:
            raise UsageError(
                f"prompt {index} has {len(ids)} tokens; with {count} new ones that is more than the {longest} "
                f"positions of this model: shorten one of them"
            )


def start(
    model: Any,
    handle: Handle,
    machinery: Machinery | None,
    *,
    prompts: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    sampling: Sampling,
    room_nbytes: int | None,
    rows: int | None,
    lanes: int | None,
) -> Work:
    """Begin to continue prompts.

    Raises:
        DoesNotFitError: not one prompt at a time fits.
        UsageError: this thread is inside a call of the model.
    """
    if handle.closed:
        raise ClosedError("the model was closed by penstock.close(); load it again")
    if machinery is not None and machinery.session.running_here():
        raise UsageError("the model cannot continue other prompts while it runs: call generate_many outside of it")
    ways = ways_of(model)
    choice = _choose(model, handle, machinery, ways, prompts, new_tokens, room_nbytes, rows, lanes)
    warpers = None if sampling.greedy else warpers_for(sampling, model.generation_config)
    made = [
        Row(
            index=index,
            prompt=tuple(ids),
            new_tokens=count,
            choice=None if warpers is None else Choice(warpers, seed=sampling.seed, index=index),
        )
        for index, (ids, count) in enumerate(zip(prompts, new_tokens, strict=True))
    ]
    return Work(model, machinery, choice, made, ways)


def _choose(
    model: Any,
    handle: Handle,
    machinery: Machinery | None,
    ways: Ways,
    prompts: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    room_nbytes: int | None,
    rows: int | None,
    lanes: int | None,
) -> Schedule:
    plan = handle.plan
    on_gpu = model.device.type != "cpu"
    if room_nbytes is None:
        device_nbytes = machinery.device.available_nbytes() if machinery is not None else None
        room_nbytes = free_host_nbytes() if device_nbytes is None else device_nbytes
    together = not plan.resident and ways.interleaves  # what does not stream has no reads to share
    return schedule(
        [Job(index=i, prompt_tokens=len(ids), new_tokens=new_tokens[i]) for i, ids in enumerate(prompts)],
        footprint_of(model.config, model.dtype),
        Machine(
            room_nbytes=room_nbytes,
            weights_nbytes=plan.weights_nbytes,
            sweep_s=0.0 if plan.resident else plan.bound_s(),
            memory_rate=_DEVICE_MEMORY_RATE if on_gpu else MEMORY_RATE,
        ),
        pads=ways.pads,
        rows=rows,
        lanes=lanes if together else 1,
        most_lanes=MOST_LANES,
    )
