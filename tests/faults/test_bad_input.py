"""Bad input ends in one line that says what to change, in the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DOES_NOT_FIT, FAILED, INDEX, USAGE, Place, check_refused
from safetensors.torch import load_file, save_file

import penstock

NORM = "model.norm.weight"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_good_checkpoint_runs(place: Place) -> None:
    outcome = place.run()
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.strip().split(",")) == 2


def test_symlinked_cache_runs(place: Place, tmp_path: Path) -> None:
    """The Hugging Face cache: a snapshot of links into a folder of blobs."""
    blobs = tmp_path / "elsewhere"
    place.folder.rename(blobs)
    place.folder.mkdir()
    for file in blobs.iterdir():
        (place.folder / file.name).symlink_to(Path("..") / "elsewhere" / file.name)
    outcome = place.run()
    assert outcome.code == 0, outcome.err


def test_no_such_folder(place: Place) -> None:
    check_refused(place.run(path=place.folder / "nowhere"), FAILED, "nowhere")


def test_only_pickles(place: Place) -> None:
    for file in place.folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"never": "read"}, place.folder / "pytorch_model.bin")
    check_refused(place.run(), FAILED, "safetensors", "pytorch_model.bin")


def test_no_config(place: Place) -> None:
    (place.folder / "config.json").unlink()
    check_refused(place.run(), FAILED, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_config_is_not_json(place: Place, text: str) -> None:
    (place.folder / "config.json").write_text(text)
    check_refused(place.run(), FAILED, "config.json")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_shard(place: Place, kept: int) -> None:
    """Nothing at all, half a length, half a header, and all but the last byte."""
    os.truncate(place.shard, kept if kept >= 0 else place.shard.stat().st_size + kept)
    check_refused(place.run(), FAILED, place.shard.name)


def test_missing_shard(place: Place) -> None:
    name = place.shard.name
    place.shard.unlink()
    check_refused(place.run(), FAILED, name)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "something-new"])
def test_quantized_checkpoint(place: Place, method: str) -> None:
    place.edit_config(quantization_config={"quant_method": method})
    check_refused(place.run(), FAILED, "quantiz", method)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1, 0])
def test_header_of_absurd_length(place: Place, length: int) -> None:
    with place.shard.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    check_refused(place.run(), FAILED, place.shard.name, "header")


@pytest.mark.parametrize("text", [b"not json", b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe{}"])
def test_header_is_not_what_it_should_be(place: Place, text: bytes) -> None:
    place.shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4096))
    check_refused(place.run(), FAILED, place.shard.name)


@pytest.mark.parametrize(
    "change", [(0, 2**40), (-8, 0), (2**40, 4), (8, -8), (4, 0)], ids=["beyond", "before", "far", "shrunk", "shifted"]
)
def test_offsets_out_of_range_or_overlapping(place: Place, change: tuple[int, int]) -> None:
    def shift(header: dict[str, Any]) -> None:
        # The last tensor in the file, so that a shift upwards leaves the file and one downwards meets its neighbour.
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        entry = max(tensors.values(), key=lambda one: one["data_offsets"][1])
        entry["data_offsets"] = [a + b for a, b in zip(entry["data_offsets"], change, strict=True)]

    place.edit_header(shift)
    check_refused(place.run(), FAILED, place.shard.name)


def test_tensors_overlap(place: Place) -> None:
    def overlap(header: dict[str, Any]) -> None:
        by_size: dict[int, list[dict[str, Any]]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                by_size.setdefault(high - low, []).append(entry)
        first, second, *_ = next(entries for entries in by_size.values() if len(entries) > 1)
        second["data_offsets"] = first["data_offsets"]

    # The first shard holds a layer's projections, several of one size.
    shard = min(place.folder.glob("*.safetensors"))
    place.edit_header(overlap, shard)
    check_refused(place.run(), FAILED, shard.name, "overlap")


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__")
    return entry


@pytest.mark.parametrize("dtype", ["F31", "", 7, None])
def test_unknown_dtype(place: Place, dtype: Any) -> None:
    place.edit_header(lambda header: _first(header).update(dtype=dtype))
    check_refused(place.run(), FAILED, place.shard.name, "dtype")


@pytest.mark.parametrize("shape", [[2**62, 2**62], [-1, 4], ["4"], 4, [3]])
def test_shape_disagrees_with_its_bytes(place: Place, shape: Any) -> None:
    place.edit_header(lambda header: _first(header).update(shape=shape))
    check_refused(place.run(), FAILED, place.shard.name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "sub/../x.safetensors", "", ".", "a\x00b"])
def test_index_names_a_file_elsewhere(place: Place, name: str) -> None:
    place.edit_index(lambda names: names.update({NORM: name}))
    check_refused(place.run(), FAILED, INDEX, "plain")


def test_link_to_a_device_is_not_read(place: Place) -> None:
    name = place.shard
    name.unlink()
    name.symlink_to("/dev/zero")
    check_refused(place.run(), FAILED, name.name, "regular file")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_index_is_not_what_it_should_be(place: Place, text: str) -> None:
    (place.folder / INDEX).write_text(text)
    check_refused(place.run(), FAILED, INDEX)


def _forget(names: dict[str, str]) -> None:
    del names[NORM]


def _rewrite(place: Place, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensor that holds the last norm, in whichever shard it lies, and the index with it."""
    names = json.loads((place.folder / INDEX).read_text())["weight_map"]
    file = place.folder / names[NORM]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if NORM not in tensors:
        place.edit_index(_forget)


def test_missing_tensor(place: Place) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM]

    _rewrite(place, remove)
    check_refused(place.run(), FAILED, NORM)


def test_index_promises_what_the_shard_lacks(place: Place) -> None:
    place.edit_index(lambda names: names.update({NORM: next(n for n in sorted(names.values()) if n != names[NORM])}))
    check_refused(place.run(), FAILED, NORM)


def test_shape_disagrees_with_the_config(place: Place) -> None:
    _rewrite(place, lambda tensors: tensors.update({NORM: torch.zeros(63)}))
    check_refused(place.run(), FAILED, NORM, "63", "64")


def test_budget_too_small_for_one_block(place: Place) -> None:
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.load(place.folder, max_memory={"host": 4096}, device="cpu")
    assert caught.value.needed_nbytes > 4096
    for memory in ("host=4KiB", "host=0"):
        check_refused(place.run(memory=memory), DOES_NOT_FIT, "host", "--max-memory host=")
    # What it says is needed is enough.
    assert place.run(memory=f"host={caught.value.needed_nbytes}").code == 0


@pytest.mark.parametrize("memory", ["host=8G", "host=8gb", "host=8g"])
def test_ambiguous_size(place: Place, memory: str) -> None:
    check_refused(place.run(memory=memory), USAGE, "8GiB", "8GB")


@pytest.mark.parametrize("memory", ["8G", "8GiB", "cpu=8GiB", "0=8GiB", "host=-1GiB", "host=", "tape=1GiB", ""])
def test_meaningless_budget(place: Place, memory: str) -> None:
    check_refused(place.run(memory=memory), USAGE)


def test_wrong_tier_names_the_right_one(place: Place) -> None:
    check_refused(place.run(memory="cpu=8GiB"), USAGE, "host")
    check_refused(place.run(memory="0=8GiB"), USAGE, "device")


@pytest.mark.parametrize("option", ["--max-memry=host=1GiB", "--device=tpu", "--max-new-tokens=0", "--prompt-ids=a,b"])
def test_meaningless_option(place: Place, option: str) -> None:
    assert place.run(option).code == USAGE


def test_checkpoint_code_does_not_run(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    place.edit_config(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="not-a-known-one"
    )
    (place.folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    check_refused(place.run(), FAILED, "--trust-remote-code")
    assert not mark.exists()
