"""Many prompts through one streamed model: the same tokens as one at a time, one read per block and sweep."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import wait_for_threads
from zoo import ZOO, load_resident, token_ids
from zoo.budgets import DEVICES, PLENTY, find_budget, streamed

import penstock
from penstock.kernels.linear_wide import WideLinear
from penstock.runtime.throughput import Completions
from penstock.runtime.throughput_batch import ways_of
from penstock.runtime.throughput_choice import Sampling
from penstock.runtime.throughput_sizes import SLACK, footprint_of, rehearsed_footprint
from penstock.runtime.throughput_start import Asked, Limits
from penstock.runtime.throughput_start import start as begin
from penstock.runtime.widening import Products
from penstock.scheduler.curves import Curve
from penstock.scheduler.microbatches import Footprint

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]

NEW = 6


@contextmanager
def closing_model(model: Any) -> Iterator[Any]:
    try:
        yield model
    finally:
        penstock.close(model)


def place(folder: Path, budget: dict[str, int], device: str) -> Any:
    return penstock.load(folder, max_memory=budget, device=device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ZOO["llama"].save(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module", params=list(DEVICES))
def shared(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with streamed(partial(place, folder), device=request.param) as model:
        yield model


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with streamed(partial(place, folder)) as model:
        yield model


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return load_resident(folder)


def ragged(*lengths: int, seed: int = 5) -> list[list[int]]:
    return [token_ids(seed=seed + i, batch=1, length=length)[0].tolist() for i, length in enumerate(lengths)]


def alone(model: Any, prompts: list[list[int]], *, new: int = NEW, **options: Any) -> list[tuple[int, ...]]:
    """What transformers' generate continues each prompt by, one at a time."""
    found = []
    for ids in prompts:
        given = torch.tensor([ids])
        result = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, **options)
        found.append(tuple(result[0, len(ids) :].tolist()))
    return found


def together(model: Any, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": NEW, **options}
    found = {done.index: done.ids for done in penstock.generate_many(model, prompts, **options)}
    assert sorted(found) == list(range(len(prompts)))
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize(("rows", "lanes"), [(1, 1), (1, 5), (2, 3), (4, 2), (None, None)])
def test_ragged_prompts_get_the_tokens_they_get_alone(
    shared: Any, resident: Any, rows: int | None, lanes: int | None
) -> None:
    prompts = ragged(5, 9, 12, 12, 7, 20, 30, 5)
    expected = alone(resident, prompts, do_sample=False)
    assert together(shared, prompts, rows=rows, lanes=lanes) == expected


@pytest.mark.parametrize("lanes", [1, 3])
def test_equal_lengths_are_bit_equal_to_generate_on_the_same_batch(shared: Any, resident: Any, lanes: int) -> None:
    """Logits too: they are looked at as they leave the model."""
    prompts = ragged(*[12] * 6)
    seen: dict[int, list[torch.Tensor]] = {}

    def look(module: Any, args: Any, result: Any) -> None:
        seen.setdefault(threading.get_ident(), []).append(result.logits[:, -1].clone())

    handle = shared.register_forward_hook(look)
    try:
        found = together(shared, prompts, rows=2, lanes=lanes)
    finally:
        handle.remove()
    expected = []
    for start in (0, 2, 4):
        ids = torch.tensor(prompts[start : start + 2])
        result = resident.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert [tuple(row) for row in result.sequences[:, 12:].tolist()] == found[start : start + 2]
        expected += list(result.logits)
    logits = [one for each in seen.values() for one in each]
    assert len(logits) == len(expected)
    for one in expected:
        assert any(torch.equal(one, other) for other in logits)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "mamba", "mixtral", "falcon", "t5", "bart"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    folder = ZOO[name].save(tmp_path / name)
    prompts = ragged(5, 9, 12, 12, 5, 20)
    with streamed(partial(place, folder)) as model:
        ways = ways_of(model)
        assert ways.pads is not model.config.is_encoder_decoder
        found = together(model, prompts, rows=2, lanes=3)
    resident: Any = load_resident(folder)
    if not resident.config.is_encoder_decoder:
        assert found == alone(resident, prompts, do_sample=False)
        return
    for ids, new in zip(prompts, found, strict=True):
        result = resident.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, num_beams=1)
        assert new == tuple(result[0, 1:].tolist())


def test_each_block_is_read_once_per_sweep_however_many_share_it(model: Any) -> None:
    prompts = ragged(*[8] * 12)
    together(model, prompts[:1])  # in the learned order from here on
    reads = []
    for lanes in (1, 4, 12):
        before = len([record for record in model.penstock.timeline.records() if record.kind == "read"])
        run = penstock.generate_many(model, prompts, max_new_tokens=12, rows=1, lanes=lanes)
        assert len(list(run)) == 12
        sweeps = run.statistics().sweeps
        records = [record for record in model.penstock.timeline.records() if record.kind == "read"][before:]
        assert sweeps == 12 * -(-12 // lanes)
        counts = Counter(record.block for record in records)
        assert max(counts.values()) <= sweeps + 2, "what is read ahead for a sweep that does not come"
        reads.append(len(records) / sweeps)
    assert max(reads) < min(reads) * 1.15


def test_products_in_fp32_are_those_of_the_resident_model(folder: Path) -> None:
    """bf16; the last hidden states of the same batches, streamed by two lanes and resident. Exact models take none."""
    prompts = [
        Asked(index=index, ids=tuple(ids), new_tokens=NEW, name=f"prompt {index}")
        for index, ids in enumerate(ragged(9, 9, 9, 9))
    ]
    products = Products(rates=Curve.flat(1e10), wide_from=1)
    counted = Counter[str]()

    def run(model: Any, what: str) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        multiply = WideLinear.__call__

        def counting(self: WideLinear, *operands: Any) -> torch.Tensor:
            counted[what] += 1
            return multiply(self, *operands)

        handle = model.model.register_forward_hook(lambda m, args, result: seen.append(result[0][:, -1].clone()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WideLinear, "__call__", counting)
            work = begin(model, prompts, Sampling(), limits=Limits(rows=2, lanes=2), products=products)
            with Completions(work, ordered=True, decode=None) as completions:
                assert len(list(completions)) == len(prompts)
        handle.remove()
        return sorted(seen, key=lambda each: each.flatten().tolist())

    def loaded(budget: dict[str, int], device: str, exact: bool = False) -> Any:
        return penstock.load(folder, max_memory=budget, device=device, dtype="bfloat16", exact=exact)

    with streamed(loaded) as model:
        found = run(model, "streamed")
    with closing_model(loaded({"host": PLENTY}, "cpu")) as resident:
        expected = run(resident, "resident")
    assert counted["resident"] - 2 * NEW == counted["streamed"] > 0  # an output layer in pieces is left to its table
    assert len(found) == len(expected) == 2 * NEW
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with closing_model(loaded({"host": PLENTY}, "cpu", exact=True)) as exact:
        run(exact, "exact")
    assert counted["exact"] == 0


def test_a_model_that_is_resident_runs_batches_in_turn(folder: Path, resident: Any) -> None:
    prompts = ragged(5, 9, 12, 7)
    model = place(folder, {"host": PLENTY}, "cpu")
    try:
        assert model.penstock.plan.resident
        run = penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2)
        assert {done.index: done.ids for done in run} == dict(enumerate(alone(resident, prompts, do_sample=False)))
        assert (run.statistics().sweeps, run.statistics().schedule.lanes) == (0, 1)
    finally:
        penstock.close(model)


def test_prompts_of_different_ends(model: Any, resident: Any) -> None:
    """Some stop at a token, some are short: batches shrink, others begin, and nobody's tokens change."""
    prompts = ragged(*[10] * 9, 6, 14)
    counts = [3, 20, 5, 20, 4, 20, 6, 3, 20, 20, 5]
    free = alone(resident, prompts, new=20, do_sample=False)
    end = Counter(token for ids in free for token in ids[4:]).most_common(1)[0][0]
    model.generation_config.eos_token_id = end
    try:
        run = penstock.generate_many(model, prompts, max_new_tokens=counts, rows=4, lanes=2)
        found = {done.index: done for done in run}
    finally:
        model.generation_config.eos_token_id = None
    stopped = 0
    for index, (ids, count) in enumerate(zip(free, counts, strict=True)):
        expected = ids[:count]
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        stopped += end in expected
        assert found[index].ids == expected
        assert found[index].finish == ("stop" if end in expected else "length")
    assert stopped > 0
    assert run.statistics().share == 1.0


def test_batches_shrink(model: Any) -> None:
    """Sequences that have ended leave their batch: the others' keys and values are copied out."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, result: sizes.append(len(result.logits)))
    try:
        prompts = ragged(10, 10, 10, 10)
        one = together(model, prompts, max_new_tokens=[24, 12, 12, 12], rows=4, lanes=1)
    finally:
        handle.remove()
    assert sizes == [4] * 12 + [1] * 12
    assert [len(ids) for ids in one] == [24, 12, 12, 12]


def test_a_long_prompt_is_prefilled_in_pieces(model: Any, resident: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.scheduler.microbatches.CHUNKS", (8,))
    prompts = ragged(30, 29, 17, 6)
    run = penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2, lanes=2)
    found = {done.index: done.ids for done in run}
    assert [batch.chunk for batch in run.statistics().schedule.batches] == [8, 8, None]
    assert [found[i] for i in range(4)] == alone(resident, prompts, do_sample=False)


def test_sampling_depends_on_the_prompt_and_not_on_its_company(shared: Any) -> None:
    prompts = ragged(5, 9, 12, 12, 7)
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    found = together(shared, prompts, rows=2, lanes=3, **options)
    assert together(shared, prompts, rows=1, lanes=1, **options) == found
    assert together(shared, prompts, rows=2, lanes=3, **options, seed=1) != found
    twice = together(shared, [prompts[0], prompts[0]], **options)
    assert twice[0] != twice[1], "two copies of a prompt are two samples"
    assert together(shared, prompts, temperature=0) == together(shared, prompts)


def test_sampling_follows_the_probabilities(model: Any, resident: Any) -> None:
    prompts = ragged(6) * 300
    with torch.no_grad():
        logits = resident(torch.tensor(prompts[:1])).logits[0, -1]
    kept = logits.topk(4)
    expected = torch.softmax(kept.values, -1)
    counts = Counter(ids[0] for ids in together(model, prompts, max_new_tokens=1, temperature=1.0, top_k=4))
    assert set(counts) <= set(kept.indices.tolist())
    for token, share in zip(kept.indices.tolist(), expected.tolist(), strict=True):
        assert counts[token] / 300 == pytest.approx(share, abs=0.12)


def test_a_penalty_that_looks_at_the_whole_row_sees_no_padding(model: Any, resident: Any) -> None:
    prompts = ragged(5, 9, 12, 12)
    for each in (model, resident):
        each.generation_config.repetition_penalty = 1.5
    try:
        assert not ways_of(model).pads
        assert together(model, prompts) == alone(resident, prompts, do_sample=False)
    finally:
        for each in (model, resident):
            each.generation_config.repetition_penalty = None


def test_two_runs_are_bit_equal_and_results_may_be_ordered(model: Any) -> None:
    prompts = ragged(5, 30, 12, 12, 7, 20)
    first = list(penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2, lanes=2))
    assert list(penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2, lanes=2)) == first
    ordered = penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2, lanes=2, ordered=True)
    assert [done.index for done in ordered] == list(range(6))


def test_an_exception_in_one_micro_batch_ends_all_and_names_the_prompts(model: Any, resident: Any) -> None:
    prompts = ragged(5, 5, 9, 9)
    before = set(threading.enumerate())

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape == (2, 5):
            raise RuntimeError("out of luck")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(penstock.PenstockError, match=r"prompts 0, 1: RuntimeError: out of luck"):
            list(penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=2, lanes=2))
        assert wait_for_threads(before) == set()
    finally:
        handle.remove()
    assert together(model, prompts) == alone(resident, prompts, do_sample=False), "the model still works"
    assert list(model.generate(torch.tensor([prompts[0]]), max_new_tokens=NEW, do_sample=False)[0, 5:].tolist()) == (
        list(alone(resident, prompts[:1], do_sample=False)[0])
    )


def test_a_drive_that_fails_is_told_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    run = penstock.generate_many(model, ragged(5, 9, 12), max_new_tokens=100, rows=1, lanes=3)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(penstock.DiskError, match=r"safetensors") as caught:
        list(run)
    assert any("prompt" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_a_run_that_nobody_reads_ends(model: Any, resident: Any, how: str) -> None:
    before = set(threading.enumerate())
    run = penstock.generate_many(model, ragged(5, 9, 12, 7), max_new_tokens=100, rows=1, lanes=4)
    if how == "close":
        run.close()
        assert list(run) == []
    elif how == "with":
        with run:
            pass
    else:
        del run
        gc.collect()
    assert wait_for_threads(before) == set()
    assert together(model, ragged(5, 9)) == alone(resident, ragged(5, 9), do_sample=False)


@pytest.mark.parametrize("level", ["nothing", "resident"])
def test_closing_the_model_ends_the_run(folder: Path, level: str) -> None:
    budget = {"host": PLENTY} if level == "resident" else find_budget(partial(place, folder), "cpu", level)
    model = place(folder, budget, "cpu")
    before = set(threading.enumerate())
    run = penstock.generate_many(model, ragged(5, 9, 12, 7), max_new_tokens=110, rows=1)
    while run.statistics().tokens < 8:
        time.sleep(0.001)
    penstock.close(model)
    with pytest.raises(penstock.ClosedError):
        list(run)
    assert wait_for_threads(before) - before == set()
    with pytest.raises(penstock.ClosedError):
        penstock.generate_many(model, ragged(5))


def test_other_threads_wait_until_the_run_is_over(model: Any, resident: Any) -> None:
    prompts = ragged(5, 9, 12, 7)
    found: list[Any] = []
    run = penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=1, lanes=2)
    found = [tuple(row) for row in alone(model, prompts[:2], do_sample=False)]
    expected = alone(resident, prompts, do_sample=False)
    assert found == expected[:2]
    assert {done.index: done.ids for done in run} == dict(enumerate(expected))


def test_two_runs_of_one_model_take_turns(model: Any, resident: Any) -> None:
    prompts = ragged(5, 9, 12, 7)
    runs = [penstock.generate_many(model, prompts, max_new_tokens=NEW, rows=1, lanes=2) for _ in range(2)]
    expected = dict(enumerate(alone(resident, prompts, do_sample=False)))
    for run in runs:
        assert {done.index: done.ids for done in run} == expected


def test_texts_and_their_tokenizer(model: Any) -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 500 + 3 for letter in text]}

        def decode(self, ids: Any, **_: Any) -> str:
            return "-".join(map(str, ids))

    (done,) = penstock.generate_many(model, ["häuser 🙂"], tokenizer=Letters(), max_new_tokens=3)
    assert done.text == "-".join(map(str, done.ids))
    assert done.prompt_tokens == 8
    with pytest.raises(penstock.UsageError, match="tokenizer="):
        penstock.generate_many(model, ["a"])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "no prompts"),
        ("abc", {}, "a list"),
        ([[]], {}, "prompt 0 has no tokens"),
        ([[5], [600]], {}, "prompt 1 has the token 600"),
        ([[5] * 126], {"max_new_tokens": 3}, "128 positions"),
        ([[5]], {"max_new_tokens": 0}, "1 or more"),
        ([[5]], {"max_new_tokens": [1, 2]}, "2 numbers for 1 prompts"),
        ([[5]], {"temperature": -1.0}, "temperature"),
        ([[5]], {"top_p": 0.0}, "top_p"),
        ([[5]], {"lanes": 17}, "1 to 16"),
        ([[5]], {"rows": 0}, "rows"),
        ([[5]], {"memory": "8G"}, "8G"),
    ],
)
def test_usage(model: Any, prompts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(penstock.UsageError, match=words):
        penstock.generate_many(model, prompts, **options)


def test_memory_that_does_not_suffice(model: Any) -> None:
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.generate_many(model, ragged(30), memory=1000)
    assert caught.value.exit_code == 3
    assert caught.value.needed_nbytes > 1000
    with pytest.raises(penstock.UsageError, match="does not run under penstock"):
        penstock.generate_many(torch.nn.Linear(2, 2), [[1]])


def test_the_caller_must_not_be_inside_the_model(model: Any) -> None:
    caught: list[BaseException] = []

    def call(*_: Any) -> None:
        try:
            penstock.generate_many(model, [[5]])
        except penstock.UsageError as error:
            caught.append(error)

    handle = model.register_forward_hook(call)  # hooks of the root run outside of its leases, of a layer inside
    inner = model.model.layers[1].register_forward_hook(call)
    try:
        model(torch.tensor([[5]]))
    finally:
        handle.remove()
        inner.remove()
    assert any("outside of it" in str(error) for error in caught)


def test_lanes_are_few_and_their_threads_have_names(model: Any) -> None:
    names = set()
    handle = model.register_forward_hook(lambda *_: names.add(threading.current_thread().name))
    try:
        together(model, ragged(*[5] * 40), rows=1)
    finally:
        handle.remove()
    assert names <= {f"penstock-lane-{lane}" for lane in range(16)}


def test_models_that_keep_a_calls_state_run_one_batch_at_a_time(model: Any, resident: Any) -> None:
    model.model.rope_deltas = None
    try:
        run = penstock.generate_many(model, ragged(5, 9), max_new_tokens=NEW, rows=1)
        assert {done.index: done.ids for done in run} == dict(enumerate(alone(resident, ragged(5, 9), do_sample=False)))
        assert run.statistics().schedule.lanes == 1
    finally:
        del model.model.rope_deltas


def test_sizes_by_config_and_by_rehearsal(folder: Path, resident: Any) -> None:
    """Five layers, two heads of 16 for keys and values, fp32: 1280 bytes per token."""

    def measured(where: Path, reserved: bool) -> Footprint:
        return rehearsed_footprint(
            str(where),
            footprint_of(resident.config, torch.float32, reserved=reserved),
            tokens=40,
            dtype="auto",
            on_cpu=True,
            trust_remote_code=False,
            reserved=reserved,
        )

    for reserved, slack in ((True, 1.0), (False, SLACK)):
        estimate = footprint_of(resident.config, torch.float32, reserved=reserved)
        assert estimate.kv_nbytes_per_token == 1280 * slack
        assert measured(folder, reserved).kv_nbytes_per_token == pytest.approx(1280 * slack, rel=0.05)
        assert measured(folder / "no", reserved) == estimate
