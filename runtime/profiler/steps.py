"""Steps, found without being told: one per token of a generation, one per optimizer step of a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .calls import Clock
from .recorder import Recorder
from .schema import NONE, Category, Compute, Phase
from .tensors import TensorWatch, kv_tensors, tier_of


class StepWatch:
    """A listener of `ModuleWatch`, and of all optimizers while it is entered.

    A step lasts until the next outermost call, so that what happens between (sampling, a tokenizer) is in it; once an
    optimizer has stepped, until one steps again. `said` switches both off: the program tells.
    """

    def __init__(self, recorder: Recorder, tensors: TensorWatch, clock: Clock) -> None:
        self._recorder = recorder
        self._tensors = tensors
        self._clock = clock
        self.said = False
        """Whether the program says itself when steps begin."""
        self._optimizers: dict[int, int] = {}
        self._begun: Any = None
        self._kv_nbytes = 0
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

    def root_begins(self, module: nn.Module) -> None:
        """A step may end here, and the next one begin."""
        self._tensors.watch(module)
        if torch.is_grad_enabled():
            self._tensors.look_at_gradients()
        if self.said:
            return
        if not self._recorder.in_step or not self._trains:
            self._recorder.begin_step("train" if self._trains else "forward")

    def root_ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """What kind of step it was shows when its arguments are known."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() and not self.said:
            if torch.is_grad_enabled():
                self._tokens = max(self._tokens, 0) + ids.numel()
            elif kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
                self._recorder.retitle("prefill" if ids.shape[1] > 1 else "decode", ids.shape[0])
        nbytes = 0
        for tensor in kv_tensors(result):
            nbytes += tensor.nbytes
            tier = tier_of(tensor)
        if nbytes != self._kv_nbytes and nbytes:
            self._recorder.memory(nbytes - self._kv_nbytes, tier, Category.KV)
            self._kv_nbytes = nbytes

    def module_returned(self, row: int, depth: int, args: tuple[Any, ...], result: Any) -> None:
        """Nothing."""

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *rest: object) -> None:
        if not self._recorder.alive:
            return
        self._recorder.hooks += 1
        self._tensors.look_at_gradients()
        self._begun = self._clock.begin()

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *rest: object) -> None:
        if self._begun is None or not self._recorder.alive:
            return
        row = self._optimizers.get(id(optimizer))
        if row is None:
            row = self._recorder.module(path="(optimizer)", kind=type(optimizer).__name__)
            self._optimizers[id(optimizer)] = row

        def done(launched: int, start: int, end: int) -> None:
            self._recorder.add(Compute(module=row, phase=Phase.OPTIMIZER, start=start, end=end, launched=launched))

        self._clock.end(self._begun, done)
        self._begun = None
        self._tensors.look_at_states(optimizer)
        if not self.said:
            self._recorder.retitle("train", self._tokens)
            self._recorder.end_step()
            self._trains, self._tokens = True, NONE
