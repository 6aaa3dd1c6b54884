"""`penstock finetune` over folders, drives and data that are not as they should be: exit code, words, what is left."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import breaking, fails, readonly_disk
from zoo.finetune import write_checkpoint, write_rows

from penstock.cli import main
from penstock.memory.filelock import FileLock
from penstock.memory.store import BlockStore
from penstock.memory.store.folder import MANIFEST, PREVIOUS
from penstock.runtime.training.data.tokenfile import HEADER

pytestmark = pytest.mark.usefixtures("states_on_disk")
OK, FAILED, USAGE, DOES_NOT_FIT = 0, 1, 2, 3
COMMITTED = 4
STEPS = 6
COMMON = ("--seq", "32", "--lr", "3e-3", "--schedule", "constant", "--commit-every", str(COMMITTED), "--device", "cpu")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user runs it, on one thread."""
    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint, data, and a run over both, whose last commit is at its last step."""

    checkpoint: Path
    rows: Path
    run: Path

    def command(self, out: Path, *options: str, memory: str = "host=64MiB") -> list[str]:
        base = ["finetune", str(self.checkpoint), "--data", str(self.rows), "--out", str(out)]
        return [*base, *COMMON, "--max-memory", memory, *options]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    checkpoint = write_checkpoint(root / "tiny", layers=2, attention_dropout=0.1)
    found = Made(checkpoint=checkpoint, rows=write_rows(root / "zen.jsonl"), run=root / "run")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(found.command(found.run, "--steps", str(STEPS))) == OK
    torch.set_num_threads(before)
    return found


@pytest.fixture
def begun(made: Made, tmp_path: Path) -> Path:
    """A run that ended at its first commit, to be gone on with."""
    out = tmp_path / "run"
    assert main(made.command(out, "--steps", str(COMMITTED))) == OK
    return out


def lines(out: Path) -> list[Any]:
    """What the steps were, but for how fast."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(step["step"], step["loss"], step["gradient_norm"], step["seen_tokens"]) for step in steps]


def refused(code: int, wanted: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The exit code, and one line that says why."""
    error = capsys.readouterr().err
    assert code == wanted, error
    said = [line for line in error.splitlines() if line.startswith("error")]
    assert len(said) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in said[0]


def check_goes_on(made: Made, out: Path) -> None:
    """To the end, and every step is that of the run which nothing happened to."""
    assert main(made.command(out, "--steps", str(STEPS), "--resume")) == OK
    assert lines(out) == lines(made.run)


@pytest.mark.parametrize(
    ("operation", "name", "code", "remedy"),
    [
        ("pwritev", "blocks.data", errno.ENOSPC, "free space"),
        ("preadv", "blocks.data", errno.EIO, "dmesg"),
        ("fdatasync", "blocks.data", errno.EIO, "dmesg"),
        ("pwrite", "manifest.new", errno.ENOSPC, "free space"),
        ("write", "metrics.jsonl", errno.ENOSPC, "make room"),
        ("fsync", "metrics.jsonl", errno.EIO, "resume the run"),
    ],
)
def test_a_drive_that_fails(
    operation: str,
    name: str,
    code: int,
    remedy: str,
    made: Made,
    begun: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    after = 30 if operation == "preadv" else 0  # behind what resuming reads
    with breaking(operation, name, fails(code), after=after) as broken:
        found = main(made.command(begun, "--steps", str(STEPS), "--resume"))
    refused(found, FAILED, capsys, broken[0], remedy)
    check_goes_on(made, begun)


def test_tokens_that_cannot_be_written(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with breaking("replace", "data.tokens.partial", fails(errno.ENOSPC)):
        found = main(made.command(out, "--steps", str(STEPS)))
    refused(found, FAILED, capsys, "data.tokens", "No space left", "free space")
    check_goes_on(made, out)


def test_a_drive_without_room_for_the_states(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Met before the first step, since all of it is taken then; a second drive, or some room, and it can begin."""
    out = tmp_path / "run"
    with breaking("posix_fallocate", "blocks.data", fails(errno.ENOSPC)):
        found = main(made.command(out, "--steps", str(STEPS)))
    refused(found, DOES_NOT_FIT, capsys, "blocks.data", "free space", "--disk")
    assert not (out / "states").exists()
    assert not list((out / "scratch").glob("*"))
    check_goes_on(made, out)


def test_bits_that_flip_in_tokens(made: Made, begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever they do, the file is made again, and the run goes on with the tokens that it began with."""
    file = begun / "data" / "data.tokens"
    draw = random.Random(4)
    good = file.read_bytes()
    for at in (70, len(good) // 3, len(good) // 2, len(good) - 40, draw.randrange(64)):
        raw = bytearray(good)
        raw[at] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)
        caplog.clear()
        assert main(made.command(begun, "--steps", str(COMMITTED), "--resume")) == OK
        assert "damaged" in caplog.text or HEADER.size <= at < 64, at  # there is nothing between header and tokens
        assert file.read_bytes() == good or HEADER.size <= at < 64
    check_goes_on(made, begun)


def test_bits_that_flip_in_metrics(made: Made, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = begun / "metrics.jsonl"
    good = file.read_bytes()
    second = good.index(b"\n") + 1
    file.write_bytes(good[:second] + b"\x7b" * 3 + good[second + 3 :])
    found = main(made.command(begun, "--steps", str(STEPS), "--resume"))
    refused(found, FAILED, capsys, str(file), f"offset {second}", "move it away")
    file.write_bytes(good + b'{"step": 5, "loss"')  # torn: of a step that no commit has
    check_goes_on(made, begun)


def test_bits_that_flip_in_states(made: Made, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BlockStore.open(begun / "states", readonly=True) as store:
        span = store.location(1)
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 100)
        byte = file.read(1)
        file.seek(span.offset + 100)
        file.write(bytes([byte[0] ^ 8]))
    found = main(made.command(begun, "--steps", str(STEPS), "--resume"))
    refused(found, FAILED, capsys, span.path, f"offset {span.offset}", "corrupt", "go back to a copy")


def test_a_manifest_that_is_missing(made: Made, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both: or else a run that steps were taken in would be begun anew."""
    states = (begun / "states" / "blocks.data").read_bytes()
    kept = {name: (begun / "states" / name).read_bytes() for name in (MANIFEST, PREVIOUS)}
    for name in kept:
        os.unlink(begun / "states" / name)
    found = main(made.command(begun, "--steps", str(STEPS), "--resume"))
    refused(found, FAILED, capsys, str(begun / "states" / MANIFEST), "missing", "--force")
    assert (begun / "states" / "blocks.data").read_bytes() == states
    for name, content in kept.items():
        (begun / "states" / name).write_bytes(content)
    check_goes_on(made, begun)


def test_another_model_other_data_other_options(
    made: Made, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", layers=3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "something else"}\n' * 40)
    command = made.command(begun, "--steps", str(STEPS), "--resume")
    for place, value, words in ((1, str(other), "checkpoint was"), (3, str(rows), "source file")):
        changed = list(command)
        changed[place] = value
        refused(main(changed), USAGE, capsys, words)
    refused(main([*command, "--clip", "0.3"]), USAGE, capsys, "clip was 1.0 and is 0.3")
    check_goes_on(made, begun)
    shutil.rmtree(begun / "states")
    found = main(made.command(begun, "--steps", str(STEPS)))
    refused(found, USAGE, capsys, "--resume goes on", "--force")


def test_two_at_once(made: Made, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has the run, or only its states, keeps them, whatever the other was told to do with them."""
    for name in ("penstock-run.lock", "states/penstock-store.lock", "scratch/.penstock-lock"):
        (begun / name).parent.mkdir(exist_ok=True)
        lock = FileLock.acquire(begun / name)
        assert lock is not None
        for option in ("--resume", "--force")[: 1 if name.startswith("scratch") else 2]:
            found = main(made.command(begun, "--steps", str(STEPS), option))
            refused(found, FAILED, capsys, f"pid {os.getpid()}", "in use")
        lock.release()
    check_goes_on(made, begun)


def test_a_disk_that_is_read_only(made: Made, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (begun, tmp_path / "new"):
        with readonly_disk():
            found = main(made.command(out, "--steps", str(STEPS), "--resume"))
        refused(found, FAILED, capsys, str(out), "Read-only")
    check_goes_on(made, begun)


def test_memory_that_is_too_small(made: Made, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(made.command(begun, "--steps", str(STEPS), "--resume", memory="host=1MiB"))
    refused(found, DOES_NOT_FIT, capsys, "host", "MiB")
    check_goes_on(made, begun)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_no_number(
    nonfinite: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fourth step, the second behind a commit."""
    out, hurt = tmp_path / "run", "penstock.runtime.training.loop.model_inputs"
    from penstock.runtime.training.evaluation import model_inputs

    options = ("--steps", str(STEPS), "--commit-every", "2", "--nonfinite", nonfinite)
    calls = iter(range(100))

    def inputs(model: Any, batch: Any) -> dict[str, Any]:
        found = model_inputs(model, batch)
        if next(calls) == 3:
            embedded = model.get_input_embeddings()(found.pop("input_ids")) * float("nan")
            found["inputs_embeds"] = embedded
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hurt, inputs)
        found = main(made.command(out, *options))
    if nonfinite == "raise":
        refused(found, FAILED, capsys, "norm of all gradients is nan", "nothing was changed", "nonfinite")
        assert main(made.command(out, *options, "--resume")) == OK
        assert lines(out) == lines(made.run)
    else:
        assert found == OK
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [step.get("updated", True) for step in steps] == [True, True, True, False, True, True]
        assert [step["loss"] is None for step in steps] == [False, False, False, True, False, False]
