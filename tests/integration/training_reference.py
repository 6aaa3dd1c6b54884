"""Training in slow, obvious plain PyTorch, and the same cases streamed: what both leave behind must have equal bits.

The reference keeps an fp32 master of every trained parameter. Each backward's gradient is made fp32 and added; torch
clips the sums and torch's own optimizer updates the masters; then the parameters become the masters, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo.budgets import PLENTY
from zoo.entry import Outputs

import penstock
from penstock.runtime.training.optimizers import OptimizerChoice
from penstock.runtime.training.pipeline import arrays_of

EMULATED = "emulated:h2d=2GiB/s,d2h=2GiB/s"
Loss = Callable[[Any, int], Tensor]
"""The loss of a model on the batch of that number."""
Schedule = Callable[[Optimizer], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One training."""

    name: str
    make: Callable[[], nn.Module]
    """The module; `build` seeds it."""
    losses: Sequence[Loss]
    """Each has a backward of its own."""
    optimizer: OptimizerChoice
    dtype: torch.dtype = torch.float32
    batches: int = 1
    """Of a step."""
    steps: int = 8
    schedule: Schedule | None = None
    between: Callable[[Any], Outputs] | None = None
    """What is done after each step, without gradients, and what comes out."""

    @property
    def accumulate(self) -> int:
        """Backward passes of a step."""
        return self.batches * len(self.losses)

    def build(self) -> Any:
        """The module with the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.make().to(self.dtype).train()


@dataclass(kw_only=True)
class Trace:
    """What a training says while it runs."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seen: list[Outputs] = field(default_factory=list)

    def outputs(self) -> Outputs:
        """As named tensors."""
        found = {"losses": torch.stack(self.losses), "norms": torch.stack(self.norms), "rates": Tensor(self.rates)}
        for step, seen in enumerate(self.seen):
            found |= {f"after step {step}: {name}": value for name, value in seen.items()}
        return found

    def since(self, step: int, case: Case) -> Trace:
        """Without the steps before."""
        return Trace(
            losses=self.losses[step * case.accumulate :],
            norms=self.norms[step:],
            rates=self.rates[step:],
            seen=self.seen[step:],
        )


class Lion(Optimizer):
    """Program 1 of "Symbolic Discovery of Optimization Algorithms"; torch has none."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * decay)
                p.add_((average * beta1).add_(p.grad, alpha=1 - beta1).sign_(), alpha=-lr)
                average.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Reference:
    """A resident model that is trained as the module's docstring says."""

    def __init__(self, case: Case, model: Any = None) -> None:
        self.model = case.build() if model is None else model
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.masters = {name: p.detach().clone().float().requires_grad_() for name, p in self.parameters.items()}
        self.choice = case.optimizer
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        kinds = {penstock.AdamW: torch.optim.AdamW, penstock.SGD: torch.optim.SGD, penstock.Lion: Lion}
        defaults = self.choice.defaults()
        groups: list[dict[str, Any]] = [{"params": [], **own} for own in (self.choice.groups or {}).values()]
        groups.append({"params": []})
        for name, master in self.masters.items():
            patterns = list(self.choice.groups or {})
            first = next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns))
            groups[first]["params"].append(master)
        made: Optimizer = kinds[type(self.choice)]([group for group in groups if group["params"]], **defaults)
        return made

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """One backward; its gradients are added in fp32."""
        loss.backward(retain_graph=retain_graph)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            grad, parameter.grad = parameter.grad.float(), None
            master = self.masters[name]
            master.grad = grad if master.grad is None else master.grad + grad

    def step(self) -> Tensor:
        """One update. Returns the norm of all gradients."""
        if self.choice.max_grad_norm is None:
            norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.choice.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.masters[name].data)
        return norm

    def state(self) -> Outputs:
        """Weights, buffers, masters, states."""
        found = {f"weight {name}": value.clone() for name, value in self.model.state_dict().items()}
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            found[f"master {name}"] = flat(master.detach()).clone()
            for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if state.get(kind) is not None:
                    found[f"{kind} {name}"] = flat(state[kind]).clone()
            if "step" in state:
                found[f"step {name}"] = torch.tensor(int(state["step"]))
        return found


class Streamed:
    """The same by `penstock.prepare` or `penstock.resume`."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """One backward."""
        loss.backward(retain_graph=retain_graph)

    def step(self) -> Tensor:
        """One update."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        norm: Tensor = self.optimizer.training.gradient_norm
        return norm

    def state(self) -> Outputs:
        """Weights and buffers as `state_dict` has them; masters and states from the files."""
        found = {f"weight {name}": value.clone() for name, value in self.model.state_dict().items()}
        training, store = self.optimizer.training, self.optimizer._store
        training.finish()
        training.write_out()  # as a commit has it
        store.drain()
        names = [each.name for each in training.trained]
        kernel = self.optimizer._choice.kernel
        kinds = ("master", *kernel.states_of(kernel.hyper_of(self.optimizer.defaults)))
        arrays = {
            name: torch.full((len(kinds), each.elements), float("nan"))
            for name, each in zip(names, training.trained, strict=True)
        }
        for shard in training._shards:
            span = store.location(shard.id)
            with open(span.path, "rb") as file:
                file.seek(span.offset)
                raw = memoryview(bytearray(file.read(span.nbytes)))
            for row, array in enumerate(arrays_of(raw, shard, len(kinds))):
                for piece in shard.pieces:
                    arrays[names[piece.parameter]][row, piece.start : piece.stop] = array[piece.at :][: piece.elements]
        for name, steps in zip(names, training.counts, strict=True):
            found[f"master {name}"] = arrays[name][0]
            for row, kind in enumerate(kinds[1:], 1):
                if steps:
                    found[f"{kind} {name}"] = arrays[name][row]
                else:
                    assert not arrays[name][row].any(), f"{kind} of {name}, which was never updated"
            if steps and "exp_avg_sq" in kinds:
                found[f"step {name}"] = torch.tensor(steps)
        return found


def flat(tensor: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def run(case: Case, trainer: Reference | Streamed, schedule: Any, steps: range, trace: Trace) -> None:
    """Train for these steps."""
    for step in steps:
        for batch in range(step * case.batches, (step + 1) * case.batches):
            for loss_of in case.losses:
                loss = loss_of(trainer.model, batch)
                trainer.backward(loss)
                trace.losses.append(loss.detach())
        trace.rates.append(trainer.optimizer.param_groups[-1]["lr"])
        trace.norms.append(trainer.step())
        if schedule is not None:
            schedule.step()
        if case.between is not None:
            with torch.no_grad():
                trace.seen.append(case.between(trainer.model))


def scheduled(case: Case, optimizer: Optimizer) -> Any:
    """The case's scheduler, if it has one."""
    return None if case.schedule is None else case.schedule(optimizer)


@cache
def resident(case: Case) -> tuple[Trace, Mapping[str, Tensor]]:
    """The reference from beginning to end: what it says, and what it leaves."""
    reference, trace = Reference(case), Trace()
    torch.manual_seed(7)
    run(case, reference, scheduled(case, reference.optimizer), range(case.steps), trace)
    return trace, reference.state()


def prepared(case: Case, folder: Path, placement: str, **options: Any) -> Streamed:
    """A fresh model in training, at one of `PLACEMENTS`."""
    device, memory = smallest(partial(_prepare, case, folder, **options), placement)
    return Streamed(*_prepare(case, folder, memory, device, **options))


def find_placement(case: Case, folder: Path, placement: str, **options: Any) -> tuple[str, dict[str, int]]:
    """Device and budgets of one of `PLACEMENTS`, for `prepare` with these options."""
    return smallest(partial(_prepare, case, folder, **options), placement)


def smallest(place: Callable[[dict[str, int], str], Any], placement: str) -> tuple[str, dict[str, int]]:
    """Device and budgets of one of `PLACEMENTS`, found by asking for one byte of a tier and reading the refusal."""
    device = EMULATED if placement == "emulated" else "cpu"
    tiers = {"resident": (), "smallest": ("host",), "emulated": ("device", "host")}
    memory = {"host": PLENTY}
    for tier in tiers[placement]:
        with pytest.raises(penstock.DoesNotFitError) as caught:
            place({**memory, tier: 1}, device)
        assert caught.value.tier == tier
        memory[tier] = caught.value.needed_nbytes
    return device, memory


def _prepare(case: Case, folder: Path, memory: dict[str, int], device: str, **options: Any) -> tuple[Any, Any]:
    return penstock.prepare(
        case.build(),
        optimizer=case.optimizer,
        disk=folder,
        max_memory=memory,
        device=device,
        accumulate=case.accumulate,
        **options,
    )


PLACEMENTS = ("resident", "smallest", "emulated")
"""Everything stays; as little as the budget can be stays, on one tier, and on three."""


def train(case: Case, folder: Path, placement: str, **options: Any) -> tuple[Trace, Outputs]:
    """The case, streamed, from beginning to end."""
    trainer, trace = prepared(case, folder, placement, **options), Trace()
    try:
        torch.manual_seed(7)
        run(case, trainer, scheduled(case, trainer.optimizer), range(case.steps), trace)
        return trace, trainer.state()
    finally:
        penstock.close(trainer.model)
