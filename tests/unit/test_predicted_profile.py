"""A forecast, and the profile that is made of it: the same figures, in the same reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.memory.errors import DoesNotFitError, UsageError
from penstock.runtime.foresight import Forecast, Foresight, Room
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.predicted import write_prediction
from penstock.runtime.profiler.reader import read_profile
from penstock.runtime.profiler.schema import Compute, Link, Step, Transfer
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Processor
from penstock.scheduler.hardware import Link as LinkRates

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "dtype": "float32",
    "tie_word_embeddings": False,
}


def processor(name: str, rate: float) -> Processor:
    return Processor(
        name=name,
        memory_nbytes=4 * 2**30,
        memory=Curve.flat(1e11),
        linear={"float32": Curve.flat(rate)},
        attention={"float32": Curve.flat(rate)},
        launch_s=1e-6,
        cores=8,
    )


def machine(*, gpu: bool) -> Hardware:
    return Hardware(
        name="paper",
        cpu=processor("cpu", 2e10),
        gpu=processor("gpu", 2e11) if gpu else None,
        link=LinkRates(h2d=Curve.flat(1e9), d2h=Curve.flat(1e9)) if gpu else None,
        host_nbytes=8 * 2**30,
        drives=(Drive(name="disk", read=Curve.flat(2e8), write=Curve.flat(1e8)),),
    )


@pytest.fixture(scope="module")
def foresight(tmp_path_factory: pytest.TempPathFactory) -> Foresight:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Foresight(folder)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def forecast(foresight: Foresight, request: pytest.FixtureRequest) -> Forecast:
    half = foresight.weights_nbytes // 2
    if request.param == "gpu":
        return foresight.forecast(machine(gpu=True), prompt=16, generated=8, room=Room(device=half, host=half))
    return foresight.forecast(machine(gpu=False), prompt=16, generated=8, room=Room(host=half))


def test_a_profile_says_what_was_predicted(forecast: Forecast, tmp_path: Path) -> None:
    write_prediction(tmp_path / "run.prof", forecast)
    profile = read_profile(tmp_path / "run.prof")
    assert not profile.problems
    assert profile.header.level == "predicted"
    turns = forecast.prediction.turns
    assert profile[Step].end.tolist() == [turn.end_ns for turn in turns]
    assert len(profile[Compute]) == len(forecast.prediction.spans)
    transfers = profile[Transfer]
    assert transfers.nbytes[transfers.link == Link.DISK_READ].sum() == forecast.prediction.read_nbytes
    summary = summarise(profile)
    assert summary.bubble is not None
    with pytest.raises(UsageError, match="--force"):
        write_prediction(tmp_path / "run.prof", forecast)


def test_what_is_read_per_token_is_what_the_plan_says(forecast: Forecast) -> None:
    plan, turns = forecast.plan, forecast.prediction.turns
    last = turns[-1]
    reads = [r for r in forecast.prediction.records if r.kind == "read" and last.start_ns < r.end_ns <= last.end_ns]
    assert sum(r.nbytes for r in reads) == pytest.approx(plan.disk_nbytes_per_sweep, rel=0.25)
    bound = max(forecast.busy_s.values())
    assert bound * 0.999 <= forecast.token_s <= 1.2 * sum(forecast.busy_s.values())
    assert forecast.binds == "disk"


def test_a_model_that_fits_computes_and_nothing_else(foresight: Foresight) -> None:
    found = foresight.forecast(machine(gpu=False), prompt=16, generated=8)
    assert found.plan.resident
    assert found.busy_s.keys() == {"CPU"}
    assert found.token_s == pytest.approx(found.busy_s["CPU"], rel=1e-3)
    # all products, at 2e10 bytes per second, are most of it
    assert found.token_s > (foresight.weights_nbytes - 1000 * 256 * 4) / 2e10


def test_what_cannot_run_is_refused_with_what_it_needs(foresight: Foresight) -> None:
    with pytest.raises(DoesNotFitError, match="needs at least"):
        foresight.forecast(machine(gpu=False), prompt=16, generated=8, room=Room(host=MIB))
    small = machine(gpu=False)
    with pytest.raises(DoesNotFitError, match="lower batch or context"):
        foresight.forecast(small, prompt=16, generated=8, batch=10**6)
