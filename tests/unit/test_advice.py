"""What would help most, where it is known what does."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from test_predicted_profile import CONFIG, machine

from penstock.runtime.advice import advise, changes, smallest_that_fits
from penstock.runtime.foresight import SYSTEM_NBYTES, Forecast, Foresight
from penstock.scheduler.hardware import Hardware


@pytest.fixture(scope="module")
def foresight(tmp_path_factory: pytest.TempPathFactory) -> Foresight:
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 40, "hidden_size": 1024}))
    return Foresight(folder)


def with_host(hardware: Hardware, nbytes: int) -> Hardware:
    return msgspec.structs.replace(hardware, host_nbytes=nbytes)


def test_memory_is_advised_where_the_disk_binds(foresight: Foresight) -> None:
    def foresee(hardware: Hardware) -> Forecast:
        return foresight.forecast(hardware, prompt=16, generated=32)

    short = with_host(machine(gpu=False), SYSTEM_NBYTES + foresight.weights_nbytes // 2 + 2**28)
    found = foresee(short)
    advice = advise(found, foresee)
    assert advice is not None
    assert advice.change.words == "16 GiB more RAM"
    assert str(advice).startswith("16 GiB more RAM: ")
    assert advice.speedup == pytest.approx(found.answer_s / foresee(advice.change.hardware).answer_s)


def test_nothing_is_advised_where_everything_fits(foresight: Foresight) -> None:
    def foresee(hardware: Hardware) -> Forecast:
        return foresight.forecast(hardware, prompt=16, generated=512 - 16)

    assert advise(foresee(machine(gpu=False)), foresee) is None


def test_the_smallest_change_that_makes_it_fit(foresight: Foresight) -> None:
    def foresee(hardware: Hardware) -> Forecast:
        return foresight.forecast(hardware, prompt=16, generated=32)

    found = smallest_that_fits(with_host(machine(gpu=False), SYSTEM_NBYTES + 2**20), foresee)
    assert found is not None
    assert found[0].words == "16 GiB more RAM"
    assert next(iter(changes(machine(gpu=False)))).words == "16 GiB more RAM"
