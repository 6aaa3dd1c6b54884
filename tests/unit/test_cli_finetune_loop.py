"""The loop of a fine-tuning run over a model and an optimizer that only note what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_data_files import word_tokenizer, words, write_rows

from penstock.memory.errors import DiskError, UsageError
from penstock.runtime.training.data.batches import Batch, collate
from penstock.runtime.training.data.dataset import DataOptions, TrainingData, open_data
from penstock.runtime.training.data.order import epoch_order
from penstock.runtime.training.evaluation import evaluate, model_inputs, takes_positions
from penstock.runtime.training.loop import Loop, LoopOptions
from penstock.runtime.training.metrics import StepRecord
from penstock.runtime.training.progress import Progress
from penstock.runtime.training.schedule import Schedule


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    rng = np.random.default_rng(0)
    texts = [(words(*rng.integers(50, size=3)), words(*rng.integers(50, size=count))) for count in (1, 4, 9)]
    rows = [{"prompt": prompt, "response": response} for prompt, response in texts]
    path = write_rows(tmp_path / "rows.jsonl", rows * 4)
    options = DataOptions(seq=16, eval_fraction=0.25)
    return open_data(path, word_tokenizer(bos=False), folder=tmp_path / "data", options=options)


class Commit:
    def __init__(self, events: list[Any]) -> None:
        self.error: Exception | None = None
        self._events = events

    def wait(self) -> None:
        self._events.append("waited")


class Recording:
    """An optimizer, as far as the loop knows one."""

    def __init__(self, events: list[Any], parameters: list[Tensor], *, norm: float = 2.0) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 1.0}]
        self.training = SimpleNamespace(gradient_norm=torch.tensor(norm), waited_s=0.0)
        self.commits: list[Any] = []
        self.random: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.last = Commit(events)
        self._events = events
        self._parameters = parameters

    def step(self) -> None:
        self.gradients.append(torch.cat([each.grad.flatten() for each in self._parameters if each.grad is not None]))
        self._events.append(f"step at {self.param_groups[0]['lr']:g}")

    def zero_grad(self) -> None:
        for each in self._parameters:
            each.grad = None

    def commit(self, scheduler: Any, extra: Any) -> Commit:
        self._events.append(f"commit {extra['step']}")
        self.commits.append(extra)
        self.random.append(torch.get_rng_state())
        return self.last


class Words(nn.Module):
    """Predicts each word from the one before, with dropout, and the loss of transformers."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(58, 58)
        self.device = torch.device("cpu")
        self.penstock = SimpleNamespace(
            statistics=lambda: SimpleNamespace(
                disk_read_nbytes=5 * len(events), disk_written_nbytes=0, h2d_nbytes=0, waited_s=0.25 * len(events)
            )
        )
        self._events = events

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        self._events.append("forward" if self.training else "evaluated")
        logits = nn.functional.dropout(self.table(input_ids), 0.1, self.training)[:, :-1]
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


class Run:
    """A loop and what it did."""

    def __init__(self, data: TrainingData, *, steps: int = 4, norm: float = 2.0, **options: Any) -> None:
        self.events: list[Any] = []
        self.model = Words(self.events)
        self.optimizer = Recording(self.events, list(self.model.parameters()), norm=norm)
        self.records: list[StepRecord] = []
        self.now = 0.0
        chosen = {"commit_every": 2, "eval_every": None, "position": None, "accumulate": 2, **options}
        self.loop = Loop(
            model=self.model,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            batches=data.batches(batch=1, accumulate=chosen["accumulate"], position=chosen["position"]),
            sequences=len(data.training),
            evaluation=lambda: data.evaluation_batches(batch=1) if chosen.get("evaluates") else iter(()),
            options=LoopOptions(
                schedule=Schedule(kind="linear", steps=steps),
                commit_every=chosen["commit_every"],
                eval_every=chosen["eval_every"],
                commit_minutes=chosen.get("commit_minutes"),
            ),
            settings={"seed": 0},
            step=chosen.get("step", 0),
            listeners=[self.records.append, lambda record: self.events.append(f"told {record.step}")],
            before_commit=lambda: self.events.append("durable"),
            stop=chosen.get("stop", lambda: False),
            clock=self.clock,
        )

    def clock(self) -> float:
        self.now += 1.0
        return self.now


def test_order_of_steps_commits_and_evaluations(data: TrainingData) -> None:
    run = Run(data, steps=3, evaluates=True)
    assert run.loop.run()
    evaluated = ["evaluated"] * len(list(data.evaluation_batches(batch=1)))
    assert run.events == [
        *("forward", "forward", "step at 1", "told 1"),
        *("forward", "forward", "step at 0.666667", "told 2", "durable", "commit 2"),
        *("forward", "forward", "step at 0.333333", *evaluated, "told 3", "durable", "commit 3", "waited"),
    ]
    assert [record.eval_loss is not None for record in run.records] == [False, False, True]
    assert run.optimizer.commits[0]["settings"] == {"seed": 0}
    assert run.model.training
    first = run.records[0]
    assert (first.seconds, first.gradient_norm, first.lr, first.step) == (1.0, 2.0, 1.0, 1)
    assert (first.computed_s, first.copied_nbytes) == (0.25, 0)  # three events of a quarter of a second each
    assert first.tokens_per_s == first.tokens
    assert first.disk_read_nbytes == 15
    assert run.records[1].seen_tokens == sum(record.tokens for record in run.records[:2])
    often = Run(data, steps=4, evaluates=True, eval_every=2)
    often.loop.run()
    assert [record.step for record in often.records if record.eval_loss is not None] == [2, 4]


def test_loss_and_gradient_are_means_over_the_tokens_of_all_batches(data: TrainingData) -> None:
    run = Run(data, steps=1, accumulate=3)
    run.model.train = lambda mode=True: run.model  # type: ignore[method-assign]  # no dropout
    nn.Module.train(run.model, False)
    run.loop.run()
    whole = collate(data.training, [int(index) for index in epoch_order(len(data.training), seed=0, epoch=0)[:3]])
    model = Words([])
    model.eval()
    expected = model(**model_inputs(model, whole)).loss
    expected.backward()
    assert run.records[0].loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(run.optimizer.gradients[0], model.table.weight.grad.flatten(), atol=1e-7)
    assert run.records[0].loss_tokens == whole.loss_tokens


@pytest.mark.parametrize("asked", range(8))
def test_a_stop_gives_up_the_step_under_way(data: TrainingData, asked: int) -> None:
    """Whenever it comes, the commit is that of a run which had ended in order, and going on from it is the same."""
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > asked

    run = Run(data, commit_every=100, stop=stop)
    torch.manual_seed(1)  # making the model draws
    assert not run.loop.run()
    done = asked // 2
    assert run.loop.step == done
    assert [each["step"] for each in run.optimizer.commits] == [done]
    whole = Run(data, commit_every=1)
    torch.manual_seed(1)
    whole.loop.run()
    if done:
        assert run.optimizer.commits[0] == whole.optimizer.commits[done - 1]
        assert torch.equal(run.optimizer.random[0], whole.optimizer.random[done - 1])
    progress = Progress.from_json(run.optimizer.commits[0])
    rest = Run(data, commit_every=100, step=progress.step, position=progress.position)
    torch.set_rng_state(run.optimizer.random[0])
    assert rest.loop.run()
    assert [record.loss for record in run.records + rest.records] == [record.loss for record in whole.records]


def test_nothing_is_committed_twice(data: TrainingData) -> None:
    run = Run(data, steps=4, commit_every=2)
    run.loop.run()
    assert [each["step"] for each in run.optimizer.commits] == [2, 4]
    stopped = Run(data, steps=4, commit_every=2, step=2, stop=lambda: True)
    assert not stopped.loop.run()
    assert stopped.optimizer.commits == []


def test_a_step_that_was_left_out_says_so(data: TrainingData) -> None:
    run = Run(data, steps=1, norm=math.inf)
    assert run.loop.run()
    assert not run.records[0].updated
    assert run.records[0].to_json()["gradient_norm"] is None


def test_a_step_with_nothing_to_learn_is_left_out(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(data, steps=2, accumulate=1)
    empty = collate(data.training, [0])
    empty = Batch(
        input_ids=empty.input_ids,
        labels=torch.full_like(empty.labels, -100),
        position_ids=empty.position_ids,
        documents=empty.documents,
        tokens=empty.tokens,
        loss_tokens=0,
    )
    monkeypatch.setattr(run.loop.batches, "step", lambda: (empty,))
    assert run.loop.run()
    assert "forward" not in run.events
    assert [record.updated for record in run.records] == [False, False]
    assert run.records[0].to_json()["loss"] is None


def test_a_commit_that_failed_surfaces_at_the_next(data: TrainingData) -> None:
    run = Run(data, commit_every=1)
    run.optimizer.last.error = DiskError("the drive is full")
    with pytest.raises(DiskError, match="full"):
        run.loop.run()
    assert run.events.count("commit 1") == 1
    assert "commit 2" not in run.events


def test_evaluation_is_a_mean_over_tokens(data: TrainingData) -> None:
    model = Words([])
    model.train()
    batches: list[Batch] = list(data.evaluation_batches(batch=1))
    found = evaluate(model, batches)
    assert model.training
    model.eval()
    (whole,) = list(data.evaluation_batches(batch=100))
    assert found == pytest.approx(model(**model_inputs(model, whole)).loss.item(), rel=1e-6)
    nothing: Iterator[Batch] = iter(())
    assert math.isnan(evaluate(model, nothing))


def test_inputs_are_those_that_the_model_takes(data: TrainingData) -> None:
    (batch,) = list(data.evaluation_batches(batch=100))

    class Positioned(Words):
        def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **others: Any) -> Any:
            raise NotImplementedError

    class Bare(Words):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            raise NotImplementedError

    assert set(model_inputs(Positioned([]), batch)) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert set(model_inputs(Words([]), batch)) == {"input_ids", "labels", "use_cache"}
    assert set(model_inputs(Bare([]), batch)) == {"input_ids", "labels"}
    assert takes_positions(Positioned([]))
    assert not takes_positions(Words([]))


def test_commits_are_due_by_steps_or_by_minutes(data: TrainingData) -> None:
    """On a clock of which a step takes 50 seconds: the second one ends after 100, which is more than 1.5 minutes."""
    run = Run(data, steps=7, commit_every=5, commit_minutes=1.5)
    run.loop.listeners = [*run.loop.listeners, lambda record: setattr(run, "now", run.now + 50)]
    assert run.loop.run()
    assert [extra["step"] for extra in run.optimizer.commits] == [2, 4, 5, 7]
    rarely = Run(data, steps=7, commit_every=5, commit_minutes=1000)
    assert rarely.loop.run()
    assert [extra["step"] for extra in rarely.optimizer.commits] == [5, 7]


def test_options_of_the_loop() -> None:
    schedule = Schedule(kind="linear", steps=1)
    with pytest.raises(UsageError, match="commit_minutes=0"):
        LoopOptions(schedule=schedule, commit_every=1, commit_minutes=0)
    with pytest.raises(UsageError, match="commit_every=0"):
        LoopOptions(schedule=schedule, commit_every=0)
    with pytest.raises(UsageError, match="eval_every=0"):
        LoopOptions(schedule=schedule, commit_every=1, eval_every=0)
