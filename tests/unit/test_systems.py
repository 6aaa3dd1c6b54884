"""Other systems' schedules: by hand where that is possible, and what must hold on every machine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.hardware import load, names
from penstock.memory.errors import DoesNotFitError, UsageError
from penstock.scheduler.modelconfig import published_shape, shape_of
from penstock.scheduler.modelshape import ModelShape
from penstock.scheduler.systems import system, systems
from penstock.scheduler.systems.prediction import Prediction
from penstock.scheduler.work import Work

OPT_30B = published_shape({"name": "OPT-30B", "layers": 48, "hidden": 7168, "heads": 56, "ffn": 28672, "vocab": 50272})
SMALL = published_shape({"name": "OPT-6.7B", "layers": 32, "hidden": 4096, "heads": 32, "ffn": 16384, "vocab": 50272})
GPT_13B = published_shape({"name": "GPT 13B", "layers": 40, "hidden": 5120, "heads": 40})
MIXTRAL = shape_of(
    {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
)


def predict(name: str, machine: str, model: ModelShape, **work: Any) -> Prediction:
    return system(name).predict(load(machine), model, Work(**work))


def one_gpu(machine: str) -> Any:
    return msgspec.structs.replace(load(machine), gpus=1)


def test_accelerate_adds_up_what_it_does_one_after_the_other() -> None:
    found = predict("accelerate", "t4-gcp", OPT_30B, batch=1, policy={"device_map": "cpu"})
    copies = OPT_30B.layer_parameters * 2 / 5.95e9
    assert found.busy["h2d"] == pytest.approx(32 * copies)
    assert found.step_s == pytest.approx(copies + (found.busy["gpu"] - _prefill_gpu(found, copies)) / 31, rel=1e-6)
    assert found.binds == "h2d"


def _prefill_gpu(found: Prediction, copies: float) -> float:
    return found.prefill_s - copies


def test_accelerate_places_layers_in_order() -> None:
    found = predict("accelerate", "rtx3060-12gb", OPT_30B, batch=1)
    assert found.notes[-1] == "layers: 7 on the GPU, 23 in host memory, 18 on disk"


def test_accelerate_fetches_chosen_experts_only_where_they_are_modules_of_their_own() -> None:
    apart = predict("accelerate", "rtx4090-4ssd", MIXTRAL, policy={"device_map": "cpu"})
    merged = predict("accelerate", "rtx4090-4ssd", MIXTRAL, policy={"device_map": "cpu", "experts": "merged"})
    assert apart.step_s < merged.step_s / 2


def test_zero_inference_is_bound_by_its_copies() -> None:
    machine = one_gpu("v100-dgx2")
    found = system("zero-inference").predict(machine, OPT_30B, Work(kind="batch", batch=8, prompt=4, generate=10))
    assert found.step_s == pytest.approx(OPT_30B.nbytes / (0.73 * 13.84e9), rel=0.01)


def test_prefetching_helps_from_nvme_and_residency_helps_everywhere() -> None:
    def rate(**policy: Any) -> float:
        work = Work(
            kind="batch", batch=64, prompt=4, generate=10, policy={"tier": "nvme", "revision": "2022", **policy}
        )
        return system("zero-inference").predict(one_gpu("v100-dgx2"), OPT_30B, work).tokens_per_s

    assert rate(prefetch=False) < rate() < rate(revision="2024") < rate(revision="2024", resident_parameters=12e9)


def test_more_gpus_share_the_copies() -> None:
    work = Work(kind="batch", batch=64, prompt=4, generate=10)
    alone, four = (
        system("zero-inference").predict(msgspec.structs.replace(load("v100-dgx2"), gpus=count), OPT_30B, work)
        for count in (1, 4)
    )
    assert 3 < four.tokens_per_s / alone.tokens_per_s < 4


def test_flexgen_reuses_weights_over_micro_batches() -> None:
    def rate(batches: int) -> float:
        policy = {"percent": [0, 100, 0, 100, 0, 100], "gpu_batch": 8, "batches": batches, "cpu_attention": True}
        return predict("flexgen", "t4-gcp", OPT_30B, kind="batch", batch=8 * batches, policy=policy).tokens_per_s

    assert rate(1) < rate(2) < rate(4)


def test_flexgen_hides_weights_under_the_first_micro_batch_only() -> None:
    # With everything but the weights on the GPU, each half layer takes the longer of copy and compute.
    policy = {"percent": [0, 100, 100, 0, 100, 0], "gpu_batch": 1}
    found = predict("flexgen", "t4-gcp", OPT_30B, kind="batch", batch=1, policy=policy)
    assert found.step_s == pytest.approx(OPT_30B.layer_parameters * 2 / 13.84e9, rel=0.05)


def test_flexgen_searches_where_no_policy_is_given() -> None:
    found = predict("flexgen", "t4-gcp", SMALL, kind="batch", batch=4, prompt=128)
    assert "policy found by search, as none was given" in found.notes
    assert found.notes[-1].startswith("percent 100 0 100 0")


def test_lohan_is_bound_by_the_gpu_at_large_batches_and_by_drives_at_small_ones() -> None:
    large = predict("lohan", "rtx4090-12ssd", GPT_13B, kind="finetune", batch=64, context=1024)
    small = predict("lohan", "rtx4090-12ssd", GPT_13B, kind="finetune", batch=4, context=1024)
    assert large.binds == "gpu"
    assert small.binds.startswith("disk")
    assert small.tflops is not None
    assert large.tflops is not None
    assert small.tflops < large.tflops < 165


def test_zero_infinity_is_slower_than_lohan() -> None:
    asked: dict[str, Any] = {"kind": "finetune", "batch": 16, "context": 1024}
    lohan = predict("lohan", "rtx4090-12ssd", GPT_13B, **asked)
    infinity = predict("zero-infinity", "rtx4090-12ssd", GPT_13B, **asked)
    assert infinity.step_s > 1.5 * lohan.step_s


def test_fiddler_computes_misses_on_the_cpu_for_one_token() -> None:
    found = predict("fiddler", "rtx4090-4ssd", MIXTRAL, prompt=16, generate=16)
    assert found.busy["cpu"] > found.busy["gpu"]
    with pytest.raises(UsageError, match="at most 256"):
        predict("fiddler", "rtx4090-4ssd", MIXTRAL, policy={"gpu_experts": 300})


def test_ktransformers_gains_from_fewer_bits() -> None:
    full = predict("ktransformers", "rtx4090-4ssd", MIXTRAL)
    four = predict("ktransformers", "rtx4090-4ssd", MIXTRAL, policy={"expert_bits": 4.5})
    assert full.step_s > 2 * four.step_s
    with pytest.raises(UsageError, match="mixtures of experts"):
        predict("ktransformers", "rtx4090-4ssd", OPT_30B)


def test_moe_lightning_approaches_its_link() -> None:
    found = predict("moe-lightning", "rtx4090-4ssd", MIXTRAL, kind="batch", batch=64, prompt=64, generate=16)
    copies = MIXTRAL.layer_parameters * 2 / 26e9
    assert copies < found.step_s < 1.2 * copies


def test_sglang_counts_the_tokens_of_prompts() -> None:
    asked: dict[str, Any] = {"kind": "batch", "batch": 64, "prompt": 96, "generate": 32}
    plain = predict("zero-inference", "h200-azure", OPT_30B, policy={"tier": "nvme"}, **asked)
    counted = predict("sglang-zero", "h200-azure", OPT_30B, **asked)
    assert counted.tokens_per_s == pytest.approx(4 * plain.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("name", systems())
@pytest.mark.parametrize("machine", [name for name in names() if name != "cpu-only"])
def test_every_system_answers_for_every_machine_or_says_what_does_not_fit(name: str, machine: str) -> None:
    trains = name in ("lohan", "zero-infinity")
    work: dict[str, Any] = {"kind": "finetune", "batch": 8} if trains else {"kind": "batch", "batch": 8}
    try:
        found = predict(name, machine, MIXTRAL, **work)
    except DoesNotFitError:
        assert load(machine).host_nbytes < MIXTRAL.nbytes * 8
        return
    assert found.tokens_per_s > 0
    assert found.step_s > 0
    assert found.binds in found.busy


@pytest.mark.parametrize("name", systems())
def test_what_cannot_be_is_refused(name: str) -> None:
    kind = "finetune" if name in ("lohan", "zero-infinity") else "batch"
    with pytest.raises(UsageError, match="needs a GPU"):
        predict(name, "cpu-only", MIXTRAL, kind=kind)
    with pytest.raises(UsageError, match=rf"policy of {name}: .*nosuch.*; its settings are"):
        predict(name, "rtx4090-12ssd", MIXTRAL, kind=kind, policy={"nosuch": 1})
    with pytest.raises(UsageError, match="does not do"):
        predict(name, "rtx4090-12ssd", MIXTRAL, kind="batch" if kind == "finetune" else "finetune")


def test_an_unknown_system_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'nosuch' is not known: use accelerate, flexgen"):
        system("nosuch")
