"""Runs that stand at a commit, for tests that do them harm, and what must come of them all the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import training_child
from training_child import CASES, STEPS, digest, one_cycle, seed, take_step
from training_reference import PLENTY, Streamed, find_placement

import penstock
from penstock.memory.errors import PenstockError

COMMITTED = 4
"""Steps of the commit that everything goes back to."""


@cache
def expected(kind: str) -> tuple[list[str], list[str]]:
    return training_child.expected(CASES[kind])


@dataclass
class Run:
    """A run that stands at a commit, with steps behind it."""

    kind: str
    folder: Path
    host: int
    trainer: Streamed
    schedule: Any
    step: int = 0

    def go(self, until: int) -> None:
        """Steps, each compared with the plain run."""
        while self.step < until:
            said = take_step(CASES[self.kind], self.trainer, self.schedule, self.step)
            assert said == expected(self.kind)[0][self.step]
            self.step += 1

    def go_and_save(self, until: int) -> None:
        self.go(until)
        self.save()

    def check(self) -> None:
        """Compare everything with the plain run."""
        assert digest(self.trainer.state(), self.schedule) == expected(self.kind)[1][self.step]

    def save(self) -> Any:
        extra = {"next": self.step}
        return penstock.save(self.trainer.model, self.trainer.optimizer, scheduler=self.schedule, extra=extra)

    def close(self) -> None:
        penstock.close(self.trainer.model)


def begin(folder: Path, kind: str = "step", *, placement: str = "smallest", **options: Any) -> Run:
    case = CASES[kind]
    expected(kind)  # now, because it draws random numbers
    device, memory = find_placement(case, folder, placement, updates=kind)
    made = penstock.prepare(
        case.build(), optimizer=case.optimizer, disk=folder, max_memory=memory, device=device, updates=kind, **options
    )
    seed(11)
    run = Run(kind, folder, memory["host"], Streamed(*made), one_cycle(made[1]))
    run.go(COMMITTED)
    run.save().wait()
    return run


def resume(folder: Path, host: int = PLENTY, kind: str = "step") -> Run:
    seed(99)
    options: dict[str, Any] = {"max_memory": {"host": host}, "device": "cpu", "updates": kind}
    made = penstock.resume(folder, model=CASES[kind].build(), scheduler=one_cycle, **options)
    return Run(kind, folder, host, Streamed(*made), made[1].scheduler, made[1].extra["next"])


def check_whole(folder: Path, host: int = PLENTY, kind: str = "step", *, step: int = COMMITTED) -> None:
    """The run goes on from its commit to its end, with the bits of one that nothing happened to."""
    run = resume(folder, host, kind)
    try:
        assert run.step == step
        run.check()
        run.go(STEPS)
        run.check()
        run.save().wait()
    finally:
        run.close()


def resumed_or_error(folder: Path) -> Run | PenstockError:
    try:
        return resume(folder)
    except PenstockError as error:
        return error


def told(error: BaseException | None) -> str:
    """An error, with what it comes from."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return " ".join(said)
