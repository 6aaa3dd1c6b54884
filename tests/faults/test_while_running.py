"""What goes wrong while a model runs surfaces in the caller, with a remedy, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import FAILED, Place, check_refused
from zoo import ZOO, differences

import penstock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def load_streamed(place: Place) -> Any:
    """The good checkpoint under the smallest budget."""
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.load(place.folder, max_memory={"host": 1}, device="cpu")
    return penstock.load(place.folder, max_memory={"host": caught.value.needed_nbytes}, device="cpu")


def sweep_thrice(model: Any) -> None:
    """More sweeps than can have been read ahead."""
    for _ in range(3):
        ZOO["llama"].sweep(model)


def test_truncated_while_running(place: Place) -> None:
    model = load_streamed(place)
    try:
        ZOO["llama"].sweep(model)
        for shard in place.folder.glob("*.safetensors"):
            os.truncate(shard, 4096)
        # What was read ahead is still good; the sweep after it cannot be.
        with pytest.raises(penstock.DiskError, match=r"safetensors"):
            sweep_thrice(model)
    finally:
        penstock.close(model)


def _broken(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_read_error_while_running(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_streamed(place)
    try:
        expected = ZOO["llama"].sweep(model)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", _broken(errno.EIO))
            with pytest.raises(penstock.DiskError, match=r"offset \d+ of .*safetensors"):
                sweep_thrice(model)
        # The drive answers again, and so does the model.
        assert differences(expected, ZOO["llama"].sweep(model)) == []
    finally:
        penstock.close(model)


def test_read_error_on_the_command_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", _broken(errno.EIO))
    check_refused(place.run(), FAILED, "safetensors")


def test_disk_full(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offload is refused, and the module is the caller's as before."""
    module = ZOO["gpt2"].build()
    expected = ZOO["gpt2"].sweep(module)
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.offload(module, max_memory={"host": 1}, device="cpu", disk=place.scratch)
    with monkeypatch.context() as patch:
        for name in ("pwrite", "pwritev"):
            patch.setattr(os, name, _broken(errno.ENOSPC))
        with pytest.raises(penstock.DiskError, match=r"(?i)space.*--disk|disk="):
            penstock.offload(module, max_memory={"host": caught.value.needed_nbytes}, device="cpu", disk=place.scratch)
    assert differences(expected, ZOO["gpt2"].sweep(module)) == []


def test_two_processes_and_one_scratch_folder(place: Place) -> None:
    """The second is told whose it is; the first goes on undisturbed."""
    module = ZOO["gpt2"].build()
    expected = ZOO["gpt2"].sweep(module)
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.offload(module, max_memory={"host": 1}, device="cpu", disk=place.scratch)
    budget = {"host": caught.value.needed_nbytes}
    model = penstock.offload(module, max_memory=budget, device="cpu", disk=place.scratch)
    try:
        program = (
            "import penstock, sys; from zoo import ZOO\n"
            f"options = dict(max_memory={budget}, device='cpu', disk={str(place.scratch)!r})\n"
            "try: penstock.offload(ZOO['gpt2'].build(), **options)\n"
            "except penstock.ScratchBusyError as error: print(error)\n"
        )
        second = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        )
        assert str(os.getpid()) in second.stdout
        assert differences(expected, ZOO["gpt2"].sweep(model)) == []
    finally:
        penstock.close(model)
