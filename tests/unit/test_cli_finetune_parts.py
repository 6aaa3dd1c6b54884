"""The parts of a fine-tuning run, each by itself: schedule, metrics, folder, progress, chart, signals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import types
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from penstock.cli.finetune_progress import FinetuneProgress, distance_text, duration
from penstock.cli.losschart import draw_loss, loss_curve, round_ticks, thinned
from penstock.cli.stopsignals import StopSignals
from penstock.memory.errors import ScratchBusyError, UsageError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.board import Board, open_board
from penstock.runtime.training.data.position import DataIdentity, Position
from penstock.runtime.training.distance import Distance, LinkRates, distance_of
from penstock.runtime.training.metrics import MetricsFile, StepRecord, read_metrics
from penstock.runtime.training.progress import Progress
from penstock.runtime.training.run import RunState, encode
from penstock.runtime.training.runfolder import RunFolder
from penstock.runtime.training.schedule import LearningRate, Schedule
from penstock.runtime.training.wear import Wear

RECORD = StepRecord(
    step=1, epoch=0.5, loss=2.5, lr=0.1, gradient_norm=1.5, tokens=100, loss_tokens=90, seen_tokens=100, seconds=2.0,
    tokens_per_s=50.0, computed_s=1.0, disk_read_nbytes=2**30, disk_written_nbytes=3 * 2**20, copied_nbytes=0,
)  # fmt: skip
PLAN: Any = SimpleNamespace(device_nbytes=0, device_budget_nbytes=None, host_nbytes=3 * 2**29, host_budget_nbytes=2**31)
POSITION = Position(
    identity=DataIdentity(tokens="t", seq=8, eval_fraction=0.0, seed=0, too_long="truncate"), epoch=1, index=2
)


def at(step: int, **values: Any) -> StepRecord:
    return dataclasses.replace(RECORD, step=step, **values)


# --- schedule --------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    linear = Schedule(kind="linear", steps=10, warmup=2)
    assert [linear.factor(step) for step in range(10)] == [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [Schedule(kind="constant", steps=3, warmup=2).factor(step) for step in range(3)] == [0.5, 1, 1]
    cosine = Schedule(kind="cosine", steps=4)
    expected = [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    assert [cosine.factor(step) for step in range(5)] == pytest.approx(expected)
    assert Schedule(kind="linear", steps=3, warmup=3).factor(2) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "step", "steps": 1}, "constant, linear, cosine"),
        ({"kind": "linear", "steps": 0}, "1 or more"),
        ({"kind": "linear", "steps": 2, "warmup": 3}, "3 steps is longer"),
    ],
)
def test_schedules_that_are_none(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Schedule(**values)


def test_learning_rates_of_groups_go_on_from_what_they_began_with() -> None:
    groups: list[dict[str, Any]] = [{"lr": 1.0}, {"lr": 0.5}]
    rate = LearningRate(groups, Schedule(kind="linear", steps=4))
    rate.set(3)
    assert [group["lr"] for group in groups] == [0.25, 0.125]
    resumed = LearningRate(json.loads(json.dumps(groups)), Schedule(kind="linear", steps=4))
    resumed.set(2)
    assert resumed.lr == 0.5
    assert rate.state_dict() == {"kind": "linear", "steps": 4, "warmup": 0}


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_keep_the_steps_of_the_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, after=0) as metrics:
        for step in range(1, 6):
            metrics.write(at(step))
        metrics.sync()
    with path.open("ab") as torn:
        torn.write(b'{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsFile(path, after=3) as metrics:
        metrics.write(at(4, loss=math.nan, eval_loss=7.0, updated=False))
    found = list(read_metrics(path))
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    plain = dataclasses.asdict(RECORD)
    del plain["eval_loss"], plain["updated"]
    assert found[0] == plain
    assert (found[3]["loss"], found[3]["eval_loss"], found[3]["updated"]) == (None, 7.0, False)
    with MetricsFile(path, after=0):
        pass
    assert path.read_bytes() == b""
    assert list(read_metrics(tmp_path / "none")) == []


def test_a_board_is_told_what_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, *, log_dir: str, purge_step: int) -> None:
            assert (log_dir, purge_step) == (str(tmp_path), 4)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    board = open_board(tmp_path, after=3)
    assert isinstance(board, Board)
    board.write(at(4, gradient_norm=math.inf, eval_loss=3.0))
    board.close()
    assert ("loss/train", 2.5, 4) in written
    assert ("loss/eval", 3.0, 4) in written
    assert "gradient norm" not in [name for name, *_ in written]
    assert written[-1][0] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    assert open_board(tmp_path, after=0) is None


# --- the folder ------------------------------------------------------------------------------------------------------


def commit(folder: Path) -> None:
    """As much of a run as is looked at."""
    state = RunState(
        names=("w",), steps=(1,), mathematics="adamw", groups=({"lr": 1.0, "params": [0]},), random={}, extra={"a": 1}
    )
    blocks = [BlockSpec(name="b", kind="optimizer", nbytes=4096)]
    with BlockStore.create(folder / "states", blocks, identity="i") as made:
        made.commit(encode(state)).wait()


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new") as run:
        assert run.state is None
        with pytest.raises(ScratchBusyError, match="another run's"):
            RunFolder(tmp_path / "new")
    assert not (tmp_path / "new").exists()  # nothing came of it
    commit(tmp_path / "new")
    with pytest.raises(UsageError, match="holds a run: --resume goes on with it, --force takes it away"):
        RunFolder(tmp_path / "new")
    with pytest.raises(UsageError, match="exclude each other"):
        RunFolder(tmp_path / "new", resume=True, force=True)
    with RunFolder(tmp_path / "new", resume=True) as run:
        assert run.state is not None
        assert run.state.extra == {"a": 1}


def test_force_takes_a_run_away_and_nothing_else(tmp_path: Path) -> None:
    commit(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "loss.svg").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "mine").write_text("")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("")
    with RunFolder(tmp_path, force=True) as run:
        assert run.state is None
        assert list(run.states.iterdir()) == []
        assert list(run.board.iterdir()) == []
    assert {each.name for each in tmp_path.iterdir()} == {"states", "data", "mine", "tensorboard"}


def test_force_does_not_touch_states_in_use(tmp_path: Path) -> None:
    commit(tmp_path)
    with BlockStore.open(tmp_path / "states"), pytest.raises(ScratchBusyError):
        RunFolder(tmp_path, force=True)
    with RunFolder(tmp_path, resume=True) as run:
        assert run.state is not None


def test_steps_without_a_commit_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match="holds a run"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path, resume=True) as run:
        assert run.state is None


def test_progress_goes_through_a_commit_and_names_what_changed() -> None:
    progress = Progress(step=3, position=POSITION, settings={"lr": 0.1, "betas": [0.9, 0.99], "clip": None})
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress
    assert again.differences({"lr": 0.1, "betas": [0.9, 0.99], "clip": None}) == []
    assert again.differences({"lr": 0.2, "betas": [0.9, 0.99], "clip": 1.0, "steps": 3}) == [
        "lr was 0.1 and is 0.2",
        "clip was not set and is 1.0",
        "steps was not set and is 3",
    ]
    for damaged in (None, {"at": 3}, {**progress.to_json(), "step": "3"}):
        with pytest.raises(UsageError, match="not made by penstock finetune"):
            Progress.from_json(damaged)


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_lines_of_progress_where_there_is_no_terminal() -> None:
    now = 0.0
    stream = StringIO()
    console = Console(file=stream, width=200)
    shown: dict[str, Any] = {"rates": LinkRates(disk_read=2.0**30, disk_write=2.0**20), "plan": PLAN}
    with FinetuneProgress(console, steps=9, done=0, clock=lambda: now, **shown) as progress:
        for step, seconds in enumerate((0.0, 5.0, 11.0, 12.0, 13.0, 30.0), 1):
            now = seconds
            progress(at(step, eval_loss=3.0 if step == 5 else None, updated=step != 6))
        progress(at(9))
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step 1/9  loss 2.5000  50 tokens/s  2 s/step  distance 0.67 (disk writes)  "
        "host 1.5 GiB of 2.0 GiB; disk 1.0 GiB read, 3 MiB written/step  ETA 0:16"
    )
    assert [line.split()[1] for line in lines] == ["1/9", "3/9", "5/9", "6/9", "9/9"]
    assert "loss 2.5000  evaluation 3.0000" in lines[2]
    assert "(left out)" in lines[3]
    assert lines[-1].endswith("ETA 0:00")


def test_a_bar_on_a_terminal() -> None:
    stream = StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    with FinetuneProgress(console, steps=4, done=1, rates=LinkRates(), plan=PLAN) as progress:
        progress(at(2, eval_loss=3.0))
    shown = stream.getvalue()
    assert "step 2/4  loss 2.5000" in shown
    assert "evaluation loss 3.0000" in shown


def test_the_distance_of_steps_is_time_over_what_takes_longest() -> None:
    steps = [at(1), at(2, seconds=4.0, computed_s=2.5, copied_nbytes=2**30)]
    rates = LinkRates(disk_read=2.0**29, disk_write=2.0**30, h2d=2.0**28)
    assert distance_of(steps, rates) == Distance(seconds=6.0, bound_s=4.0, binds="disk reads")
    assert distance_of(steps, rates).value == 1.5
    assert distance_of(steps[1:], rates) == Distance(seconds=4.0, bound_s=4.0, binds="host-to-device link")
    # what was not measured bounds nothing
    assert distance_of(steps, LinkRates()) == Distance(seconds=6.0, bound_s=3.5, binds="compute")
    assert distance_of([at(1, computed_s=0.0)], LinkRates()).value is None
    assert distance_text([at(1, computed_s=0.0)], LinkRates()) == ""


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("done", [0, 3, 4])
def test_wear_counts_steps_and_commits(every: int, done: int) -> None:
    wear, steps = Wear(step_nbytes=1000, commit_nbytes=7), 10
    expected = 0
    for step in range(done + 1, steps + 1):
        expected += 1000 + 7 * (step % every == 0 or step == steps)
    assert wear.nbytes(done=done, steps=steps, commit_every=every) == expected


def test_durations() -> None:
    assert [duration(value) for value in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]


def test_the_chart_is_one_picture_with_both_lines() -> None:
    records: list[dict[str, Any]] = [{"step": step, "loss": 6 / step} for step in range(1, 2001)]
    records[999]["eval_loss"] = 1.5
    records[3]["loss"] = None
    curve = loss_curve(records)
    assert len(curve.training) <= 800
    assert curve.evaluation == [(1000.0, 1.5)]
    picture = draw_loss(curve, title="a <model> & more")
    root = ElementTree.fromstring(picture)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [line.get("class") for line in lines] == ["train", "eval"]
    heights = [float(point.split(",")[1]) for point in str(lines[0].get("points")).split()]
    assert heights == sorted(heights)  # the loss falls, so the line does
    assert "a &lt;model&gt; &amp; more" in picture
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    ElementTree.fromstring(draw_loss(loss_curve(records[:1]), title="one step"))


def test_points_are_thinned_to_means() -> None:
    assert thinned([(1, 2), (2, 4), (3, 6)], most=2) == [(1.5, 3), (3, 6)]
    assert thinned([], most=2) == []


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.31, 5.55), (3.0, 3.0), (0.001, 0.0011), (-1, 900)])
def test_ticks_are_round_and_hold_everything(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert high <= ticks[-1]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_a_wish_to_end(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping()
        assert stopping.exit_code == code
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.signal is number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_the_main_threads() -> None:
    found = []

    def enter() -> None:
        with StopSignals() as stopping:
            found.append(stopping())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]
