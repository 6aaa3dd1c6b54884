"""Steps, found without being told: one per token of a generation, one per optimizer step of a training."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .caches import CacheWatch
from .calls import ModuleWatch, is_bare
from .clocks import Clock
from .guard import harmless
from .recorder import Recorder
from .schema import NONE, Phase
from .spans import Spanned
from .temporaries import TemporaryWatch
from .tensors import TensorWatch
from .tokens import VERIFY


class _Thread(threading.local):
    """Optimizers that step in one thread, outermost first: some step others, or run the model again."""

    def __init__(self) -> None:
        self.under_way: list[tuple[int, Any]] = []
        """Id of each, and when it began."""


class StepWatch:
    """A listener of `ModuleWatch`, and of all optimizers while it is entered.

    A step lasts until the next outermost call, so that what happens between (sampling, a tokenizer) is in it; once an
    optimizer has stepped, until one steps again and, where several do, the last one has. A call of a module that holds
    nothing, such as a loss, begins none. `said` switches all this off: the program tells.
    """

    def __init__(self, recorder: Recorder, watch: ModuleWatch, tensors: TensorWatch, clock: Clock) -> None:
        self._recorder = recorder
        self._watch = watch
        self._caches = CacheWatch(recorder)
        self._tensors = tensors
        self._clock = clock
        self.said = False
        """Whether the program says itself when steps begin."""
        self._optimizers: dict[str, int] = {}
        """By class: its row."""
        self._temporaries: TemporaryWatch | None = None
        self._local = _Thread()
        self._over: int | None = None
        """When the last optimizer of the step under way had stepped; the step goes on if another one steps."""
        self._trains = False
        """Whether an optimizer has stepped: steps last from one to the next from then on."""
        self._tokens = NONE
        self._handles: list[Any] = []

    def __enter__(self) -> StepWatch:
        self._handles = [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        return self

    def __exit__(self, *failure: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._end_what_is_over()

    def look_at_temporaries(self, temporaries: TemporaryWatch) -> None:
        """Tell it of steps of optimizers from now on."""
        self._temporaries = temporaries

    def say(self) -> None:
        """The program tells steps itself from now on."""
        self._end_what_is_over()
        self.said = True

    def _end_what_is_over(self) -> None:
        over, self._over = self._over, None
        if over is not None and not self.said:
            self._recorder.end_step(over)

    @harmless
    def root_begins(self, module: nn.Module) -> None:
        """A step may end here, and the next one begin."""
        if self._temporaries is not None:
            self._temporaries.ends()
        self._tensors.watch(module)
        if is_bare(module):
            return
        if torch.is_grad_enabled():
            self._tensors.look_at_gradients(module.parameters())
        if self.said or self._local.under_way:  # an optimizer that runs the model again is in the midst of a step
            return
        self._end_what_is_over()
        if not self._recorder.in_step or not self._trains:
            self._tokens = NONE
            self._recorder.begin_step("train" if self._trains else "forward", module=self._watch.row(module))

    @harmless
    def root_ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """What kind of step it was shows when its arguments are known."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() and not self.said:
            if torch.is_grad_enabled():
                self._tokens = max(self._tokens, 0) + ids.numel()
            elif kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
                phase = self._phase(ids.shape[1], kwargs)
                gained = self._caches.gained(kwargs.get("past_key_values"), ids.shape[1], verifies=phase == VERIFY)
                self._recorder.retitle(phase, ids.shape[0] * gained)
        self._caches.look(result, self._watch.row(module))

    def _phase(self, tokens: int, kwargs: dict[str, Any]) -> str:
        """What a call of a generation did with so many new tokens per sequence.

        Where a cache held the tokens before them, they are a guess that the call verifies, unless only the logits of
        the last one were wanted: then the call read on in a prompt.
        """
        if tokens == 1:
            return "decode"
        wanted = kwargs.get("logits_to_keep")
        if isinstance(wanted, int) and wanted == 1:
            return "prefill"
        return VERIFY if self._caches.held_before(kwargs.get("past_key_values"), tokens) else "prefill"

    @harmless
    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._recorder.alive:
            return
        self._recorder.hooks += 1
        self._tensors.look_at_gradients(p for group in optimizer.param_groups for p in group["params"])
        under_way = self._local.under_way
        for place, (known, _) in enumerate(under_way):
            if known == id(optimizer):
                del under_way[place:]  # they raised, and torch told nobody
                break
        if self._temporaries is not None and not under_way:
            self._temporaries.begins(self._row(optimizer), args, kwargs)
        under_way.append((id(optimizer), self._clock.begin()))

    @harmless
    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *rest: object) -> None:
        under_way = self._local.under_way
        while under_way and under_way[-1][0] != id(optimizer):
            under_way.pop()
        if not under_way or not self._recorder.alive:
            return
        if self._temporaries is not None and len(under_way) == 1:
            self._temporaries.ends()
        span = Spanned(self._recorder, self._row(optimizer), Phase.OPTIMIZER, self._watch.lane(), len(under_way) - 1)
        self._clock.end(under_way.pop()[1], span)
        self._tensors.states.look_at(optimizer)
        if not self.said and not under_way:
            self._recorder.retitle("train", self._tokens)
            self._over = self._recorder.clock()
            self._trains = True

    def _row(self, optimizer: torch.optim.Optimizer) -> int:
        kind = type(optimizer).__name__
        row = self._optimizers.get(kind)
        if row is None:
            row = self._optimizers[kind] = self._recorder.module(path="(optimizer)", kind=kind)
        return row
