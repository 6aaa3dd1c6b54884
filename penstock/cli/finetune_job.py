"""From a request to a run that can begin: the checkpoint looked at, the data tokenized, everything checked that can be
before the first byte of state is written. Imported late: torch and transformers take seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.status import Status
from transformers import set_seed

from ..memory.errors import UsageError
from ..runtime.pretrained import locate, outline
from ..runtime.training import adapters
from ..runtime.training.data.batches import Batches
from ..runtime.training.data.dataset import DataOptions, TrainingData, open_data
from ..runtime.training.data.tokenizing import TokenizingProgress
from ..runtime.training.decay import undecayed
from ..runtime.training.facade import StreamedOptimizer
from ..runtime.training.optimizers import SGD, AdamW, Lion, OptimizerChoice
from ..runtime.training.progress import Progress
from ..runtime.training.schedule import Schedule
from ..training import prepare
from ..training import resume as go_on
from .finetune_request import DECAY_ALL, FinetuneRequest, Recipe
from .output import Output
from .text import find_tokenizer

SEQ: Final = 1024
"""Tokens of a sequence, where neither the user nor the model says less."""
_KINDS: Final[dict[str, type[OptimizerChoice]]] = {kind.mathematics: kind for kind in (AdamW, SGD, Lion)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A run, ready to begin or to go on."""

    folder: str
    """Of the checkpoint."""
    data: TrainingData
    batches: Batches
    schedule: Schedule
    choice: OptimizerChoice
    lora: Any
    """A `peft.LoraConfig`; None where all weights are trained."""
    settings: dict[str, Any]
    """For the commits."""
    step: int
    """Steps that are done."""
    goes_on: bool
    """Whether there is a commit to go on from."""

    def start(self, request: FinetuneRequest) -> tuple[Any, StreamedOptimizer]:
        """The model and its optimizer, with random numbers as they are to be at the next step.

        Raises:
            DoesNotFitError: memory or a drive is too small.
            StoreError: the folder's states are damaged.
        """
        common: dict[str, Any] = {
            "max_memory": request.max_memory,
            "device": request.device,
            "accumulate": request.recipe.accumulate,
            "activations": request.activations,
            "context": self.data.training.seq,
            "batch": request.recipe.batch,
            "packed": True,
            "nonfinite": request.recipe.nonfinite,
            "trust_remote_code": request.trust_remote_code,
        }
        if self.goes_on:
            return go_on(request.out, **common)
        set_seed(request.recipe.seed)  # what adapters begin with
        made = prepare(
            self.folder,
            optimizer=self.choice,
            disk=request.out,
            lora=self.lora,
            dtype=request.recipe.dtype,
            **common,
        )
        set_seed(request.recipe.seed)
        return made


def make_ready(request: FinetuneRequest, tokens: Path, found: Progress | None, output: Output) -> Job:
    """Look at checkpoint and data.

    Args:
        request: What was asked.
        tokens: Folder that they are kept in.
        found: How far the run was at its last commit; None for a new one.
        output: Told how far tokenizing is.

    Raises:
        UsageError: checkpoint, data and options do not go together, or are others than the run began with.
        CheckpointError: the checkpoint, or its tokenizer, is missing or damaged.
    """
    recipe = request.recipe
    with output.busy("looking at the checkpoint"):
        folder = locate(request.checkpoint, trust_remote_code=request.trust_remote_code)
        tokenizer = find_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        if tokenizer is None:
            raise UsageError(f"{request.checkpoint} has no tokenizer: put its tokenizer.json beside the weights")
        bones = outline(folder, dtype=recipe.dtype, trust_remote_code=request.trust_remote_code)
    seq = sequence_length(bones, recipe.seq)
    data = _tokenized(request, tokens, tokenizer, seq, output)
    check_ids(bones, data.largest_id)
    batches = data.batches(
        batch=recipe.batch, accumulate=recipe.accumulate, position=None if found is None else found.position
    )
    steps = batches.steps(recipe.epochs or 1) if recipe.steps is None else recipe.steps
    name = os.path.abspath(request.checkpoint) if os.path.isdir(request.checkpoint) else request.checkpoint
    settings = recipe.settings(checkpoint=name, seq=seq, steps=steps)
    if found is not None and (differences := found.differences(settings)):
        raise UsageError(
            f"{request.out} cannot be gone on with: {'; '.join(differences)}. Give what it began with, or begin anew "
            "with --force"
        )
    lora = None
    trained: Any = bones
    if recipe.lora is not None:
        lora = adapters.peft().LoraConfig(**recipe.lora.settings())
        trained = adapters.put(bones, lora)
    shapes = {
        name: tuple(each.shape)
        for name, each in trained.named_parameters()
        if each.is_floating_point() and (lora is None or each.requires_grad)
    }
    return Job(
        folder=folder,
        data=data,
        batches=batches,
        schedule=Schedule(kind=recipe.schedule, steps=steps, warmup=recipe.warmup_steps(steps)),  # type: ignore[arg-type]
        choice=optimizer_choice(recipe, shapes),
        lora=lora,
        settings=settings,
        step=0 if found is None else found.step,
        goes_on=found is not None,
    )


def _tokenized(request: FinetuneRequest, tokens: Path, tokenizer: Any, seq: int, output: Output) -> TrainingData:
    recipe = request.recipe
    options = DataOptions(
        seq=seq,
        eval_fraction=recipe.eval_fraction,
        seed=recipe.seed,
        too_long=recipe.too_long,  # type: ignore[arg-type]
    )
    with output.busy("tokenizing") as status:

        def told(progress: TokenizingProgress) -> None:
            if isinstance(status, Status):
                share = progress.nbytes / max(progress.of_nbytes, 1)
                status.update(f"tokenizing: {progress.tokens:,} tokens, {share:.0%} …")

        return open_data(request.data, tokenizer, folder=tokens, options=options, progress=told)


def sequence_length(bones: Any, asked: int | None) -> int:
    """Tokens of a sequence.

    Args:
        bones: The model, without weights.
        asked: None for the default.

    Raises:
        UsageError: the model has fewer positions, or does not continue texts.
    """
    kind = type(bones).__name__
    if not bones.can_generate() or bones.main_input_name != "input_ids" or bones.config.is_encoder_decoder:
        raise UsageError(
            f"a {kind} does not continue texts by itself, so there is no loss to train it on: train it from Python "
            "with penstock.prepare"
        )
    positions = getattr(bones.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return asked or SEQ
    if asked is not None and asked > positions:
        raise UsageError(
            f"--seq {asked} is more than the {positions} positions of this model: give {positions} or less"
        )
    return asked or min(SEQ, positions)


def check_ids(bones: Any, largest_id: int) -> None:
    """See that the model has a row for every token of the data.

    Raises:
        UsageError: the tokenizer is another model's.
    """
    embedding = getattr(bones.get_input_embeddings(), "weight", None)
    if embedding is not None and largest_id >= embedding.shape[0]:
        raise UsageError(
            f"the data have the token id {largest_id}, and the model knows 0 to {embedding.shape[0] - 1}: its "
            "tokenizer is another model's, or was given more tokens; give the checkpoint with the one that it came with"
        )


def optimizer_choice(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> OptimizerChoice:
    """The optimizer with its groups.

    Args:
        recipe: What was asked.
        shapes: Of the parameters, by name.

    Raises:
        UsageError: a hyperparameter has no meaning, or a pattern matches nothing.
    """
    hyper = recipe.hyperparameters()
    patterns: tuple[str, ...] = ()
    if hyper["weight_decay"] and recipe.no_decay != DECAY_ALL:
        given = recipe.no_decay
        patterns = undecayed(shapes) if given is None else tuple(part.strip() for part in given.split(","))
    groups = {pattern: {"weight_decay": 0.0} for pattern in patterns} or None
    choice = _KINDS[recipe.optimizer](max_grad_norm=recipe.clip or None, groups=groups, **hyper)
    choice.grouped(list(shapes))
    return choice
