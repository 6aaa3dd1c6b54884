"""Processes that train until they are killed. Run as a script it forks such processes on demand.

Each goes on with the run that it finds, or begins one, and says what it sees: where it goes on, a digest of everything
that the run is made of, the loss and the norm of every step, and which commits were begun and published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]

import numpy as np
import torch
from mortal import Mortal, say
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from training_reference import Case, Reference, Streamed

import penstock
from penstock.cli import main
from penstock.memory.errors import StoreError
from penstock.memory.store import Commit
from penstock.runtime.training import preparing

LIFE_S: Final = 60
"""Nobody lives longer, should the killer die first."""
STEPS: Final = 9
EVERY: Final = 2
"""Steps from one commit to the next."""


class Small(nn.Module):
    """Has dropout, and a norm whose buffers the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(24, 64)
        self.norm = nn.BatchNorm1d(64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.outputs = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inputs(x))
        for layer in self.layers:
            x = x + functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        out: Tensor = self.outputs(x)
        return out


def guess(model: Any, batch: int) -> Tensor:
    """On data that every generator has a part in, and the number of the batch, too."""
    x = torch.randn(8, 24) + random.random() + torch.from_numpy(np.random.standard_normal((1, 24))).float()
    loss: Tensor = functional.cross_entropy(model(x), (torch.arange(8) + batch) % 5)
    return loss


def one_cycle(optimizer: Any) -> Any:
    """Changes the rate and the betas."""
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)


CASES: Final = {
    "step": Case(
        name="step",
        make=Small,
        losses=(guess,),
        optimizer=penstock.AdamW(lr=1e-2, max_grad_norm=0.5, groups={"*bias": {"weight_decay": 0.0}}),
        schedule=one_cycle,
    ),
    "backward": Case(
        name="backward",
        make=Small,
        losses=(guess,),
        optimizer=penstock.AdamW(lr=1e-2),
        schedule=one_cycle,
    ),
}
"""By when weights are updated."""


def seed(number: int) -> None:
    """Of all generators."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def digest(state: Mapping[str, Tensor], schedule: Any) -> str:
    """Of weights, masters, states and buffers, the learning rate's scheduler, and all generators."""
    made = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        made.update(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    plain = {name: value for name, value in schedule.state_dict().items() if not callable(value)}
    made.update(repr(sorted(plain.items())).encode())
    made.update(torch.get_rng_state().numpy().tobytes())
    made.update(repr((np.random.get_state()[1:], random.getstate())).encode())  # type: ignore[index]
    return made.hexdigest()


def take_step(case: Case, trainer: Reference | Streamed, schedule: Any, step: int) -> str:
    """One step; its loss and norm, exactly."""
    loss = case.losses[0](trainer.model, step)
    trainer.backward(loss)
    norm = trainer.step()
    schedule.step()
    return f"{loss.item().hex()} {norm.item().hex() if case.optimizer.max_grad_norm else '-'}"


def expected(case: Case) -> tuple[list[str], list[str]]:
    """What every step says, and the digest before the first step and after each, of a run in plain PyTorch."""
    reference = Reference(case)
    schedule = one_cycle(reference.optimizer)
    seed(11)
    states, said = [digest(reference.state(), schedule)], []
    for step in range(STEPS):
        said.append(take_step(case, reference, schedule, step))
        states.append(digest(reference.state(), schedule))
    return said, states


def train(kind: str, folder: str, host: int, *, on_disk: bool) -> None:
    """Go on with the run, or begin it, and carry it to its end; `on_disk`: with no states in host memory."""
    if on_disk:
        plain = preparing.plan_room
        preparing.plan_room = lambda *args, **options: replace(plain(*args, **options), resident=frozenset())  # type: ignore[assignment]
    case = CASES[kind]
    options: dict[str, Any] = {"max_memory": {"host": host}, "device": "cpu", "updates": kind}
    seed(12345)  # what goes on must not depend on it
    try:
        model, optimizer = penstock.resume(folder, model=case.build(), scheduler=one_cycle, **options)
        first, schedule = optimizer.extra["next"], optimizer.scheduler
        say("resumed", first)
    except StoreError as error:
        say("fresh", error)
        model, optimizer = penstock.prepare(case.build(), optimizer=case.optimizer, disk=folder, **options)
        first, schedule = 0, one_cycle(optimizer)
        seed(11)
    trainer = Streamed(model, optimizer)
    say("state", first, digest(trainer.state(), schedule))
    commit = None
    for step in range(first, STEPS):
        say("step", step, take_step(case, trainer, schedule, step))
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            say("saving", step + 1)
            commit = penstock.save(model, optimizer, scheduler=schedule, extra={"next": step + 1})
            commit.add_done_callback(lambda done, step=step: _tell(done, step + 1))  # type: ignore[misc]
    if commit is not None:  # else the commit of the last step was found
        commit.wait()
    say("state", STEPS, digest(trainer.state(), schedule))
    penstock.close(model)
    say("ended")


def _tell(commit: Commit, step: int) -> None:
    say("done" if commit.error is None else f"failed {commit.error}", step)


def finetune(folder: str, arguments: list[str]) -> None:
    """The command line, whose words go to a file."""
    os.environ.pop("PENSTOCK_DEBUG", None)
    with open(f"{folder}.said", "a") as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(arguments)
    say("exit", code)


def serve() -> None:
    """Fork a process per line of input: JSON of `last`, `kind`, `folder` and what the kind takes. "gone" at its end."""
    torch.set_num_threads(1)
    import penstock.cli.finetuning  # what is imported late is imported here, once for all  # noqa: F401

    for order in _orders():
        pid = os.fork()
        if pid == 0:
            _live(order)
        os.waitpid(pid, 0)
        say("gone")


def _live(order: dict[str, Any]) -> None:
    signal.alarm(LIFE_S)
    code = 1
    try:
        mortal = Mortal(order["last"])
        mortal.install()
        if order["kind"] == "finetune":
            finetune(order["folder"], order["arguments"])
        else:
            train(order["kind"], order["folder"], order["host"], on_disk=order["last"] % 3 > 0)
        say("operations", mortal.count)
        code = 0
    except BaseException as error:
        say("error", type(error).__name__, " ".join(str(error).split()))
        traceback.print_exc()
    finally:
        os._exit(code)


def _orders() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


if __name__ == "__main__":
    serve()
