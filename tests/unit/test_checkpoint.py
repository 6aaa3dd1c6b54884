"""Headers and indices: what is accepted, and every way in which they can lie."""

import json
import os
from pathlib import Path

import pytest

from penstock.memory.checkpoint import Checkpoint
from penstock.memory.errors import CheckpointError
from penstock.memory.safetensors_header import same_bytes

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [24, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
}


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"__metadata__": {"format": "pt"}, **GOOD}, bytes(range(26)))
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["a", "empty", "b"]
    assert checkpoint.files == (str(path),)
    assert checkpoint.nbytes == 26
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.tensors["empty"].spans == ()
    (span,) = checkpoint.tensors["b"].spans
    assert path.read_bytes()[span.offset : span.offset + span.nbytes] == bytes([24, 25])


def entry(**changes: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **changes}}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"not json", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": "\xff"}', "JSON"),
        (b"[]", "list"),
        (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', "twice"),
        (b'{"a": {"dtype": "F32", "dtype": "U8", "shape": [24], "data_offsets": [0, 24]}}', "twice"),
        ({"__metadata__": {"format": 1}}, "__metadata__"),
        ({"a": 3}, "'a'"),
        (entry(more=1), "'a'"),
        (entry(dtype="F31"), "F31"),
        (entry(dtype=["F32"]), "unknown dtype"),
        (entry(shape=[-2, -3]), "shape"),
        (entry(shape=[2.0, 3]), "shape"),
        (entry(shape=[True, 6]), "shape"),
        (entry(shape="23"), "shape"),
        (entry(shape=[0, 2**64], data_offsets=[0, 0]), "shape"),
        (entry(shape=[1] * 65), "shape"),
        (entry(shape=[2, 4]), "32 bytes"),
        (entry(shape=[2**62, 2**62]), "bytes"),
        (entry(data_offsets=[24, 0]), "offsets"),
        (entry(data_offsets=[-24, 0]), "offsets"),
        (entry(data_offsets=[0, 24, 48]), "offsets"),
        (entry(data_offsets=[100, 124]), "truncated"),
        (entry(data_offsets=[1, 25]), "hole of 1"),
        ({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [22, 26]}}, "overlaps"),
        (entry(), "belong to none"),
    ],
)
def test_lies_in_a_header(tmp_path: Path, header: object, word: str) -> None:
    write(tmp_path / "model.safetensors", header, bytes(26))
    refused(tmp_path, word)


def test_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1234567")
    refused(tmp_path, "too short")
    write(path, GOOD, bytes(26), length=10_000)
    refused(tmp_path, "10000", "truncated")
    write(path, GOOD, bytes(26), length=2**63)
    refused(tmp_path, str(2**63), "100000000")
    write(path, GOOD, bytes(25))
    refused(tmp_path, "truncated")


def shards(folder: Path, weight_map: object) -> None:
    write(folder / "one.safetensors", {"a": GOOD["a"]}, bytes(24))
    write(folder / "two.safetensors", {"b": {**GOOD["b"], "data_offsets": [0, 2]}}, bytes(2))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    (tmp_path / "model.safetensors.index.json").unlink()
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    write(tmp_path / "three.safetensors", {"a": GOOD["a"]}, bytes(24))
    refused(tmp_path, "'a'", "one.safetensors", "three.safetensors")


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("../../etc/passwd", "plain"),
        ("/etc/passwd", "plain"),
        ("../x.safetensors", "plain"),
        ("/x.safetensors", "plain"),
        ("sub/one.safetensors", "plain"),
        ("sub\\one.safetensors", "plain"),
        ("x\0.safetensors", "plain"),
        ("..", "plain"),
        (7, "plain"),
        ("none.safetensors", "missing"),
        ("\ud800.safetensors", "missing"),
        ("two.safetensors", "lacks"),
    ],
)
def test_lies_in_an_index(tmp_path: Path, place: object, word: str) -> None:
    shards(tmp_path, {"a": place, "b": "two.safetensors"})
    refused(tmp_path, word)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json", "again")


def test_links_end_at_regular_files(tmp_path: Path) -> None:
    path = tmp_path / "snapshot" / "model.safetensors"
    path.parent.mkdir()
    write(tmp_path / "blob", GOOD, bytes(26))
    path.symlink_to("../blob")
    assert Checkpoint.open(path.parent).nbytes == 26
    os.mkfifo(tmp_path / "pipe")
    for target in ("../pipe", "/dev/zero", "..", "../none", "model.safetensors"):
        path.unlink()
        path.symlink_to(target)
        refused(path.parent, "model.safetensors")


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    refused(tmp_path, "no *.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pytorch_model.bin", "save_pretrained")


def test_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"a": GOOD["a"]}, bytes(24))
    write(tmp_path / "y.safetensors", {"b": GOOD["a"]}, bytes(23) + b"x")
    tensors = Checkpoint.open(tmp_path).tensors
    a, b = tensors["a"], tensors["b"]
    assert same_bytes(a.spans, a.spans)
    assert not same_bytes(a.spans, b.spans)
    assert same_bytes(a.slice_rows(0, 1).spans, b.slice_rows(0, 1).spans)
    assert same_bytes((*a.slice_rows(0, 1).spans, *a.slice_rows(0, 1).spans), a.spans)
    assert not same_bytes(a.slice_rows(0, 1).spans, a.spans)
