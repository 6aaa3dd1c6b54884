"""Drives that fail under a cache in tiers: an error where it is, and nothing wrong after it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import penstock
from penstock.memory.ledger import process_ledger
from penstock.memory.transfer import Transfer
from penstock.runtime.kv.spill import arrive

CONFIG = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
IDS = torch.randint(1, 97, (1, 100), generator=torch.Generator().manual_seed(1))


class Drive:
    """Reads and writes that can be made to fail from now on, after some that succeed."""

    def __init__(self) -> None:
        self.read_error = self.write_error = 0
        self.left = 0
        self.only = ""
        """A part of the names of those files."""
        self.goes = threading.Event()
        """Reads wait for it."""
        self.goes.set()
        self.stuck = threading.Event()
        """Whether one ever waited."""

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fail(fd, self.read_error)
        if not self.goes.is_set():
            self.stuck.set()
            assert self.goes.wait(60)
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fail(fd, self.write_error)
        return os.pwritev(fd, buffers, offset)

    def _fail(self, fd: int, error: int) -> None:
        if error and self.only in os.readlink(f"/proc/self/fd/{fd}"):
            self.left -= 1
            if self.left < 0:
                raise OSError(error, os.strerror(error))


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    made = Drive()
    monkeypatch.setattr("penstock.memory.disk._preadv", made.read)
    monkeypatch.setattr("penstock.memory.disk._pwritev", made.write)
    return made


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG, **HEADS)).eval()
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


@pytest.fixture
def cache(model: Any, drive: Drive, tmp_path: Path) -> Iterator[Any]:
    budget = {"host": "128KiB", "disk": "4MiB"}
    made = penstock.TieredCache(model.config, max_memory=budget, block_tokens=4, disk=tmp_path)
    yield made
    made.close()


def sequence(model: Any, cache: Any = None) -> torch.Tensor:
    made: torch.Tensor = model.generate(IDS, max_new_tokens=30, do_sample=False, past_key_values=cache)
    return made


def several_tokens(model: Any, cache: Any) -> None:
    for _ in range(3):  # the first of them find what was read before
        model(input_ids=IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("after", [0, 1, 7, 40, 200])
def test_a_read_that_fails(model: Any, cache: Any, drive: Drive, after: int) -> None:
    expected = sequence(model)
    drive.read_error, drive.left = errno.EIO, after
    with pytest.raises(penstock.DiskError, match=r"cannot read .* of .*layer-\d.kv: Input/output error; the drive"):
        sequence(model, cache)
    drive.read_error = 0
    cache.reset()
    assert torch.equal(sequence(model, cache), expected)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [0, 5, 30])
def test_a_write_that_fails(model: Any, cache: Any, drive: Drive, error: int, after: int) -> None:
    expected = sequence(model)
    drive.write_error, drive.left = error, after
    with pytest.raises(penstock.DiskError, match=r"cannot write 4096 bytes at offset \d+ of .*layer-\d.kv"):
        sequence(model, cache)
    drive.write_error = 0
    cache.reset()
    assert torch.equal(sequence(model, cache), expected)


def test_after_an_error_a_cache_that_was_not_reset_is_refused(model: Any, cache: Any, drive: Drive) -> None:
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        model(input_ids=IDS[:, :1], past_key_values=cache)
        drive.read_error, drive.only = errno.EIO, "layer-1"
        with pytest.raises(penstock.DiskError):
            several_tokens(model, cache)
        drive.read_error = 0
        with pytest.raises(penstock.PenstockError, match=r"interrupted by an error.*reset it"):
            model(input_ids=IDS[:, :1], past_key_values=cache)


def test_a_cache_that_is_closed_while_it_is_read_gives_nothing(model: Any, cache: Any, drive: Drive) -> None:
    """What waits for the drive is cancelled then, and its buffers hold what they held before."""
    met: list[BaseException] = []

    def call() -> None:
        try:
            with torch.no_grad():
                model(input_ids=IDS[:, :1], past_key_values=cache)
        except BaseException as error:
            met.append(error)

    with torch.no_grad():
        model(input_ids=IDS[:, :1], past_key_values=cache)
        engine = cache.tiers._memory.engine
        engine.threads = 1  # one read is at the drive, and others wait
        model(input_ids=IDS, past_key_values=cache)
    drive.goes.clear()
    calling, closing = threading.Thread(target=call), threading.Thread(target=cache.close)
    calling.start()
    assert drive.stuck.wait(60)
    until_s = time.monotonic() + 60
    while engine.statistics().queued < 2 and time.monotonic() < until_s:
        time.sleep(0.001)
    closing.start()
    while not all(one._closed for one in engine._drives.values()) and time.monotonic() < until_s:
        time.sleep(0.001)
    drive.goes.set()
    for thread in (calling, closing):
        thread.join(60)
    assert [type(error) for error in met] == [penstock.ClosedError]
    transfer = Transfer(1)
    transfer.cancel()
    transfer.part_done(None)
    assert transfer.wait(), "a drive says no more than that it is done with it"
    with pytest.raises(penstock.ClosedError, match="closed while it was read"):
        arrive(transfer)


def test_a_cache_that_is_closed_stays_so(model: Any, cache: Any) -> None:
    """Whoever was about to add the first tokens of a layer does not make its memory anew."""
    keys = torch.zeros(1, 2, 4, 8)
    cache.tiers.append(0, keys, keys)
    cache.close()
    held = process_ledger().reserved("host")
    with pytest.raises(penstock.ClosedError, match="make a new one"):
        cache.tiers.append(1, keys, keys)
    assert process_ledger().reserved("host") == held == 0


def test_no_folder_to_write_to(model: Any, drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = penstock.TieredCache(
        model.config, max_memory={"host": "128KiB", "disk": "4MiB"}, block_tokens=4, disk=tmp_path / "file"
    )
    with pytest.raises(penstock.DiskError, match="is not a folder"):
        sequence(model, cache)
    cache.close()


CHILD = f"""
import torch, penstock
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(**{CONFIG}, **{HEADS})).eval()
cache = penstock.TieredCache(model.config, max_memory={{"host": "128KiB", "disk": "4MiB"}}, block_tokens=4)
with torch.no_grad():
    model(input_ids=torch.ones(1, 200, dtype=torch.long), past_key_values=cache)
    print("running", flush=True)
    while True:
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        cache.crop(-1)
"""


def test_what_a_killed_process_leaves_is_removed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    scratch = tmp_path / "penstock" / "scratch"
    left = [path for path in scratch.iterdir() if path.is_dir()]
    assert len(left) == 1
    cache = penstock.TieredCache(model.config, max_memory={"host": "128KiB", "disk": "4MiB"}, block_tokens=4)
    assert torch.equal(sequence(model, cache), sequence(model))
    assert not left[0].exists()
    cache.close()
    assert not [path for path in scratch.iterdir() if path.is_dir()]
