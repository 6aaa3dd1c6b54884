"""`penstock store` through `main`, on small stores; and the files and folders that exports are made of."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.cli import main
from penstock.cli.store.copying import copy_files
from penstock.cli.store.outfolder import whole_folder
from penstock.cli.store.weightfiles import WeightFiles
from penstock.memory.checkpoint import Checkpoint
from penstock.memory.errors import DiskError, DoesNotFitError, UsageError
from penstock.memory.store import BlockSpec, BlockStore
from penstock.runtime.training.exported import ExportedTensor
from penstock.runtime.training.run import RunState, encode

BLOCK = 5000
STATE = RunState(
    names=("a", "b"),
    steps=(7, 6),
    mathematics="adamw",
    groups=({"lr": 0.5, "params": [0]}, {"lr": 0.25, "params": [1]}),
    random={},
    source="somewhere",
)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three blocks, two commits; the second changed one block."""
    folder = tmp_path / "run"
    specs = [BlockSpec(name=f"shard {i}", kind="optimizer", nbytes=BLOCK + i) for i in range(3)]
    with BlockStore.create(folder / "states", specs, identity="x") as store:
        for i in range(3):
            store.write(i, bytes([i]) * (BLOCK + i))
        store.commit(encode(STATE)).wait()
        store.write(1, b"z" * (BLOCK + 1))
        store.commit(encode(STATE)).wait()
    return folder


def flip(run: Path, block: int) -> tuple[Path, int]:
    with BlockStore.open(run / "states", readonly=True) as store:
        span = store.location(block)
    data = bytearray(Path(span.path).read_bytes())
    data[span.offset + 100] ^= 4
    Path(span.path).write_bytes(data)
    return Path(span.path), span.offset


def test_verify_reads_all_and_names_what_is_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(run)]) == 0
    assert capsys.readouterr() == ("ok: 3 blocks of commit 2, 14.65 KiB\n", "")
    path, offset = flip(run, 1)
    assert main(["store", "verify", str(run)]) == 1
    out, error = capsys.readouterr()
    first, last = out.splitlines()
    assert error == ""
    assert first.startswith(
        f"bad: block 1 (optimizer 'shard 1'), 4.88 KiB at offset {offset} of {path}: its checksum is"
    )
    assert last.startswith("1 of 3 blocks of commit 2, 14.65 KiB are bad: ")
    assert main(["store", "verify", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["good"], found["commit"], found["blocks"], found["nbytes"]) == (False, 2, 3, 3 * BLOCK + 3)
    assert [(bad["name"], bad["path"], bad["offset"]) for bad in found["bad"]] == [("shard 1", str(path), offset)]


def test_verify_tells_of_a_manifest_in_doubt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "states" / "manifest").write_bytes(b"nonsense")
    assert main(["store", "verify", str(run)]) == 1
    assert "commit 1, the one before, was read in its place" in capsys.readouterr().out


def test_prune_gives_half_back_and_leaves_the_commit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "prune", str(run)]) == 0
    out, _ = capsys.readouterr()
    assert out == "gave 24.00 KiB back, and removed manifest.previous; commit 2 stays\n"
    assert main(["store", "prune", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["commit"], again["slots"], again["freed_nbytes"], again["removed"]) == (2, 3, 0, [])
    assert main(["store", "verify", str(run)]) == 0


def test_stats_tell_of_store_and_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "stats", str(run)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["folder"] == str(run / "states")
    assert lines["commit"] == "2"
    assert lines["steps"] == "7"
    assert lines["optimizer"] == "adamw, lr 0.5, 0.25"
    assert lines["trains"] == "2 parameters of somewhere"
    assert lines["blocks"] == "3 (optimizer 14.65 KiB), 1 written by the last commit"
    assert main(["store", "stats", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nbytes_by_kind"] == {"optimizer": 3 * BLOCK + 3}
    assert found["training"]["source"] == "somewhere"
    assert "metadata" not in found


def test_stats_before_the_first_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BlockStore.create(tmp_path / "states", [BlockSpec(name="a", kind="optimizer", nbytes=1)], identity="").close()
    assert main(["store", "stats", str(tmp_path)]) == 0
    assert "commit   none yet\n" in capsys.readouterr().out
    assert main(["store", "stats", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] is None
    assert main(["store", "export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no commit yet" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["verify", "stats", "prune"])
def test_a_folder_without_a_run_is_one_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", verb, str(tmp_path)]) == 1
    states = tmp_path / "states"
    assert capsys.readouterr() == (
        "",
        f"error: {states} does not exist: name the folder that the run was started with\n",
    )


def test_folders_that_were_moved_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [BlockSpec(name=f"{i}", kind="optimizer", nbytes=BLOCK) for i in range(4)]
    with BlockStore.create([tmp_path / d / "states" for d in "ab"], specs, identity="x") as store:
        for i in range(4):
            store.write(i, bytes(BLOCK))
        store.commit(encode(STATE)).wait()
    (tmp_path / "b").rename(tmp_path / "c")
    assert main(["store", "verify", str(tmp_path / "a")]) == 1
    assert "name all its folders" in capsys.readouterr().err
    assert main(["store", "verify", str(tmp_path / "a"), "--drive", str(tmp_path / "c")]) == 0


# --- files ------------------------------------------------------------------------------------------------------------


def exported(name: str, value: torch.Tensor) -> ExportedTensor:
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    return ExportedTensor(name=name, dtype=dtypes[value.dtype], shape=tuple(value.shape))


@pytest.mark.parametrize(("most", "files"), [(10**6, 1), (70, 3), (1, 5)])
def test_files_hold_what_was_written_in_any_order(tmp_path: Path, most: int, files: int) -> None:
    torch.manual_seed(0)
    values = {
        "a": torch.randn(3).to(torch.bfloat16),  # an odd number of two bytes, before what has four
        "b": torch.randn(5, 3),
        "ü": torch.randn(7, 5),
        "empty": torch.empty(0, 4),
        "c": torch.randn(()),
    }
    tensors = [exported(name, value) for name, value in values.items()]
    with WeightFiles(str(tmp_path), tensors, most_nbytes=most) as target:
        for name, value in reversed(values.items()):
            raw = bytes(value.reshape(-1).view(torch.uint8).tolist())
            for at in reversed(range(0, len(raw), 8)):
                target.write(name, at, memoryview(raw)[at : at + 8])
    assert len(target.names) == files
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == target.names
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == values.keys()
    assert checkpoint.metadata == {"format": "pt"}
    for name, source in checkpoint.tensors.items():
        assert all(span.offset % values[name].element_size() == 0 for span in source.spans)
    found = {name: value for each in target.names for name, value in load_file(tmp_path / each).items()}
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_files_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    tensor = ExportedTensor(name="huge", dtype="F32", shape=(2**20, 2**30))
    with pytest.raises(DoesNotFitError, match=r"4\.00 PiB"):
        WeightFiles(str(tmp_path), [tensor])
    assert not list(tmp_path.iterdir())


def test_a_config_says_the_dtype_that_was_chosen(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden": 1}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{ }")
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "model.safetensors").write_text("")
    copy_files(str(source), str(target), "bfloat16")
    assert sorted(os.listdir(target)) == ["config.json", "tokenizer.json"]
    assert (target / "tokenizer.json").read_text() == "{ }"
    expected = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden": 1}}
    assert json.loads((target / "config.json").read_text()) == expected
    (target / "config.json").unlink()
    (target / "tokenizer.json").unlink()
    copy_files(str(source), str(target), "auto")
    assert (target / "config.json").read_text() == json.dumps(config)


# --- folders ----------------------------------------------------------------------------------------------------------


def make(path: Path, *, text: str = "new", **options: Any) -> None:
    with whole_folder(path, force=options.pop("force", False), **options) as folder:
        (folder / "model.safetensors").write_text(text)


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out, force=False) as folder:
        (folder / "model.safetensors").write_text("new")
        assert not out.exists()
    assert os.listdir(out.parent) == ["out"]
    assert os.listdir(out) == ["model.safetensors"]
    with pytest.raises(UsageError, match="is there already: replace it by --force"):
        make(out)
    make(out, text="newer", force=True)
    assert (out / "model.safetensors").read_text() == "newer"
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    make(tmp_path / "out", text="old")

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", force=True) as folder:
        fail(folder)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


def _file(path: Path) -> None:
    path.write_text("mine")


def _notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def _tree(path: Path) -> None:
    (path / "states").mkdir(parents=True)
    (path / "model.safetensors").write_text("mine")


def _link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("there", [_file, _notes, _tree, _link])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path, there: Callable[[Path], None]) -> None:
    there(tmp_path / "out")
    with pytest.raises(UsageError, match="name another"):
        make(tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out", text="source")
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(UsageError, match="is what is to be read"):
        make(tmp_path / "out", force=True, never=[None, str(tmp_path / "link")])
    assert (tmp_path / "out" / "model.safetensors").read_text() == "source"


def test_a_place_where_nothing_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="Name a folder elsewhere"):
        make(tmp_path / "file" / "out")
