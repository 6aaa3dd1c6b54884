"""The optimizer as torch's own code sees it: schedulers, Trainer, accelerate. It owns no state; `Training` does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...memory.errors import UsageError
from ...memory.store import BlockStore, Commit
from .buffers import pack_buffers
from .optimizers import OptimizerChoice
from .run import Origin, RunState, Settings, encode, plain_groups, random_state
from .training import Training


class StreamedOptimizer(torch.optim.Optimizer):
    """What `penstock.prepare` returns beside the model. Use it as any optimizer of torch.

    `step()` returns before the update is done: each part of the model is updated before its next use. Learning rates
    and other hyperparameters are those of the moment of `step()`.
    """

    def __init__(
        self,
        training: Training,
        choice: OptimizerChoice,
        store: BlockStore,
        *,
        model: nn.Module,
        origin: Origin,
        settings: Settings,
        state: RunState | None = None,
    ) -> None:
        """`model`: what is trained. `state`: of the commit that the run goes on from; None for a new one."""
        self._model = weakref.ref(model)  # which owns what owns this
        self._training = training
        self._choice = choice
        self._store = store
        self._origin = origin
        self._settings = settings
        self.scheduler: Any = None
        """Of the learning rate, where `resume` made one."""
        self.saved_scheduler = None if state is None else state.scheduler
        self.extra = None if state is None else state.extra
        """What was given to `save`, in a run that goes on."""
        parameters = [each.parameter for each in training.trained]
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        made = choice.grouped([each.name for each in training.trained])
        groups = [{"params": [parameters[index] for index in members], **hyper} for hyper, members in made]
        if state is not None:
            groups = [{**_exact(group), "params": [parameters[i] for i in group["params"]]} for group in state.groups]
        self._complete = False
        super().__init__(groups, choice.defaults())
        self._complete = True
        if settings.updates == "backward":
            training.begin_early(self._hypers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made.

        Raises:
            UsageError: it is complete.
        """
        if self._complete:
            raise UsageError(
                "what a run trains is settled when it is prepared, and masters and states of other parameters are not "
                "there: let all that is ever to be trained have requires_grad before penstock.prepare, and freeze what "
                "is to wait by requires_grad_(False) afterwards"
            )
        super().add_param_group(param_group)

    @property
    def training(self) -> Training:
        """What carries the steps out."""
        return self._training

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Raises:
            NonFiniteGradientError: a gradient is infinite or not a number; nothing was changed.
            PenstockError: what the step before it met in the background.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._training.step(
            self._hypers(), max_norm=self._choice.max_grad_norm, skip_nonfinite=self._settings.skip_nonfinite
        )
        return loss

    def _hypers(self) -> list[Any]:
        """Hyperparameters of each parameter, as the groups have them now.

        Raises:
            UsageError: one has no meaning, or asks for states that are not kept.
        """
        kernel = self._choice.kernel
        kept = kernel.states_of(kernel.hyper_of(self._choice.defaults()))
        found: list[Any] = [None] * len(self._training.trained)
        for number, group in enumerate(self.param_groups):
            try:
                hyper = kernel.hyper_of(group)
            except ValueError as error:
                raise UsageError(f"parameter group {number}: {error}") from error
            if (wanted := kernel.states_of(hyper)) != kept:
                raise UsageError(
                    f"parameter group {number} was changed so that it keeps {', '.join(wanted) or 'no states'}; the "
                    f"run was made for {', '.join(kept) or 'none'}, and what its shards hold cannot change"
                )
            for parameter in group["params"]:
                found[self._index[id(parameter)]] = hyper
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used.

        They are not kept in `.grad`, so there are none to fill with zeros: `set_to_none` makes no difference.

        Raises:
            UsageError: parts of the model have been updated with them (`updates="backward"`).
        """
        self._training.forget()

    def commit(self, scheduler: dict[str, Any] | None, extra: Any) -> Commit:
        """Make the present state durable. See `penstock.save`."""
        self._training.check_between()
        model = self._model()
        state = RunState(
            names=tuple(each.name for each in self._training.trained),
            steps=tuple(self._training.counts),
            mathematics=self._choice.mathematics,
            groups=plain_groups(self.param_groups, self._index),
            random=random_state(),
            buffers={} if model is None else pack_buffers(model),
            source=self._origin.source,
            dtype=self._origin.dtype,
            adapters=self._origin.adapters,
            frozen=self._origin.frozen,
            limit_nbytes=self._training.limit_nbytes,
            max_grad_norm=self._choice.max_grad_norm,
            scheduler=scheduler,
            extra=extra,
        )
        document = encode(state)
        commit = self._store.reserve()
        commit.add_done_callback(self._training.saved())
        self._training.cut(lambda: self._store.commit(document, commit), commit.finish)
        return commit

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, and which moment of the run they belong to; masters and states stay where they are.

        It is no checkpoint: `penstock.save` makes one. Trainers pass it around.
        """
        groups = plain_groups(self.param_groups, self._index)
        return {"state": {}, "param_groups": list(groups), "steps": list(self._training.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set hyperparameters to what `state_dict` gave at this moment of the run.

        Raises:
            UsageError: it is of another moment, or another optimizer's: its states are not there.
        """
        groups = state_dict.get("param_groups", [])
        members = [group["params"] for group in plain_groups(self.param_groups, self._index)]
        same = state_dict.get("steps") == self._training.counts and [group.get("params") for group in groups] == members
        if not same or state_dict.get("state"):
            raise UsageError(
                "load_state_dict of a streamed optimizer takes what its state_dict gave since the last step, no other: "
                "masters and states are not in it. Save with penstock.save(model, optimizer), and go on with "
                "penstock.resume(folder)"
            )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def _exact(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it was: JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
