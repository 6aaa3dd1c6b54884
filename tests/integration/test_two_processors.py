"""Many prompts, with lanes that alternate between the device and the CPU: the same bits as when they take turns."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import wait_for_threads
from test_oncpu import FEW, Processors, below, calls, check_at_rest, computed, every_other
from test_throughput import alone, ragged
from zoo import ZOO, load_resident

import penstock
from penstock.runtime.layout import Layout
from penstock.runtime.sweep import Sweep
from penstock.runtime.throughput import Completions
from penstock.runtime.throughput_batch import ways_of
from penstock.runtime.throughput_choice import Sampling
from penstock.runtime.throughput_start import Asked, Limits, start
from penstock.scheduler.microbatches import Schedule, cut
from penstock.scheduler.processors import ALWAYS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEW = 6
LENGTHS = (5, 9, 12, 12, 7, 20, 30, 5)


@pytest.fixture(autouse=True, scope="module")
def one_core_for_each_processor() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints, each written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            ZOO[name].save(folder / name)
        return folder / name

    return find


@pytest.fixture
def model(saved: Callable[[str], Path]) -> Iterator[Any]:
    """Every other block that stays in host memory can be computed there, in calls of few rows."""
    with computed(saved("llama"), every_other) as model:
        yield model


@pytest.fixture(scope="module")
def resident(saved: Callable[[str], Path]) -> Any:
    return load_resident(saved("llama"))


def odd_layers(_: torch.nn.Module, layout: Layout) -> dict[int, int]:
    """Whole layers, with the keys and values of their attention."""
    assert layout.back is not None
    names = {block.id: block.name for block in layout.blocks}
    return {block: FEW for block in layout.back.resident if re.match(r"model\.layers\.[13]\b", names[block])}


def begin(
    model: Any,
    prompts: list[list[int]],
    *,
    share: float = 1.0,
    rows: int = 2,
    lanes: int = 2,
    new: int | list[int] = NEW,
    sampling: Sampling | None = None,
) -> Completions:
    """A run in which the CPU computes this share of what it can."""
    counts = [new] * len(prompts) if isinstance(new, int) else new
    asked = [
        Asked(index=index, ids=tuple(ids), new_tokens=count, name=f"prompt {index}")
        for index, (ids, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    choice = Schedule(
        batches=cut([each.job for each in asked], rows, pads=ways_of(model).pads),
        lanes=lanes,
        prefill_tokens=64,
        nbytes=0,
        sweeps=0,
        seconds=0.0,
        cpu_share=share,
    )
    work = start(model, asked, sampling or Sampling(), limits=Limits(), choice=choice)
    return Completions(work, ordered=True, decode=None)


def ids_of(run: Completions) -> list[tuple[int, ...]]:
    return [done.ids for done in run]


@pytest.mark.parametrize(
    "processors",
    [below(FEW), below(ALWAYS), every_other, odd_layers],
    ids=["few", "always", "every other", "odd layers"],
)
def test_the_same_bits_as_in_turns_and_as_resident(
    saved: Callable[[str], Path], resident: Any, processors: Processors
) -> None:
    """Prompts of other lengths, and fewer lanes than micro-batches: prompts run beside tokens."""
    prompts, counts = ragged(*LENGTHS), [3, 9, 5, 8, 4, 7, 9, 6]
    expected = [
        ids[:count] for ids, count in zip(alone(resident, prompts, new=9, do_sample=False), counts, strict=True)
    ]
    with computed(saved("llama"), processors) as model:
        assert ids_of(begin(model, prompts, share=0.0, new=counts)) == expected
        assert calls(model) == 0
        for rows, lanes, share in ((2, 2, 1.0), (1, 4, 1.0), (2, 3, 0.5), (2, 1, 1.0)):
            run = begin(model, prompts, share=share, rows=rows, lanes=lanes, new=counts)
            assert ids_of(run) == expected, (rows, lanes, share)
            assert 0 < run.statistics().cpu_share <= 1
        assert calls(model) > 0
        check_at_rest(model)


def test_logits_are_bit_equal_in_turns_and_not(model: Any) -> None:
    """By micro-batch and step; equal tokens would hide a last bit."""
    prompts = ragged(*[12] * 6)

    def logits(share: float) -> dict[tuple[int, ...], torch.Tensor]:
        found: dict[tuple[int, ...], torch.Tensor] = {}

        def look(module: Any, args: Any, kwargs: Any, result: Any) -> None:
            step = kwargs["past_key_values"].get_seq_length()
            found[step, *kwargs["input_ids"][:, -1].tolist()] = result.logits.clone()

        handle = model.register_forward_hook(look, with_kwargs=True)
        try:
            ids_of(begin(model, prompts, share=share, lanes=3))
        finally:
            handle.remove()
        return found

    expected, got = logits(0.0), logits(1.0)
    assert expected.keys() == got.keys()
    assert len(expected) == 3 * NEW
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert calls(model) > 0


@pytest.mark.parametrize(
    "name", ["llama-bf16", "gpt2", "opt", "gemma3", "qwen3", "falcon", "mixtral", "qwen3-moe", "mamba", "t5", "bart"]
)
def test_other_architectures(saved: Callable[[str], Path], name: str) -> None:
    """Sliding windows, a tied table, experts, states without keys, an encoder with a decoder."""
    prompts = ragged(5, 9, 12, 12, 5, 20)
    for processors in (below(FEW), every_other):
        with computed(saved(name), processors) as model:
            expected = ids_of(begin(model, prompts, share=0.0, lanes=3))
            assert ids_of(begin(model, prompts, lanes=3)) == expected
            check_at_rest(model)


def test_both_processors_work_at_once(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane stays on the CPU until another one has passed through a matrix on the device."""
    passed = threading.Condition()
    on_device: Counter[int] = Counter()
    met: list[bool] = []
    away = Sweep.away

    def others() -> int:
        return sum(count for thread, count in on_device.items() if thread != threading.get_ident())

    def device(*_: Any) -> None:
        with passed:
            on_device[threading.get_ident()] += 1
            passed.notify_all()

    @contextmanager
    def stay_away(sweep: Sweep, part: Hashable, blocks: Sequence[int]) -> Iterator[None]:
        before = others()  # nobody else has the device now
        with away(sweep, part, blocks):
            if len(met) < 8:
                with passed:
                    met.append(passed.wait_for(lambda: others() > before, timeout=2))
            yield

    monkeypatch.setattr(Sweep, "away", stay_away)
    with computed(saved("llama"), odd_layers) as model:
        for layer in model.model.layers[::2]:
            for part in layer.mlp.children():
                part.register_forward_hook(device)
        ids_of(begin(model, ragged(*[9] * 4), lanes=2, new=8))
    assert len(met) == 8
    assert sum(met) >= 4, "a lane that is behind the other one may have nobody beside it"


def test_orders_are_learned_by_class_of_sweep(saved: Callable[[str], Path]) -> None:
    """Sweeps of tokens, sweeps with a prompt in them, and single prompts: each comes as it did the last time."""
    prompts, counts = ragged(*LENGTHS), [3, 9, 5, 8, 4, 7, 9, 6]
    with computed(saved("llama"), every_other) as model:
        for _ in range(2):
            ids_of(begin(model, prompts, lanes=2, new=counts))
        before = model.penstock.statistics().executor.orders
        run = begin(model, prompts, lanes=2, new=counts)
        ids_of(run)
        after = model.penstock.statistics().executor.orders
        assert after.calls - before.calls == run.statistics().sweeps
        assert after.mismatched - before.mismatched <= run.statistics().sweeps // 4
        assert after.relearned == before.relearned


def test_the_link_carries_less(saved: Callable[[str], Path]) -> None:
    """What the CPU computes is copied for prompts only, and what it does not is copied once per sweep."""
    prompts = ragged(*[9] * 4)
    with computed(saved("llama"), every_other) as model:
        copied = {}
        for share in (0.0, 0.5, 1.0):
            ids_of(begin(model, prompts, share=share, new=20))
            before = model.penstock.statistics().h2d_nbytes
            run = begin(model, prompts, share=share, new=20)
            ids_of(run)
            copied[share] = (model.penstock.statistics().h2d_nbytes - before) / run.statistics().sweeps
        plan = model.penstock.plan
        assert copied[0.0] == pytest.approx(plan.with_all_copied().link_nbytes_per_sweep, rel=0.1)
        assert copied[1.0] < 1.15 * plan.link_nbytes_per_sweep + plan.with_all_copied().link_nbytes_per_sweep / 20
        assert copied[1.0] < copied[0.5] < copied[0.0]


def test_shares_are_told_as_they_are(model: Any) -> None:
    prompts = ragged(*[9] * 4)
    machinery = model.penstock._machinery
    nbytes = {block.id: block.image.data_nbytes for block in machinery.layout.blocks}
    total = sum(nbytes[block] for block in machinery.units.on_cpu)
    for share in (0.0, 0.25, 0.5, 1.0):
        part = machinery.units.part(share, nbytes)
        largest = max(sum(nbytes[block] for block in unit.blocks) for unit in machinery.units.units)
        assert sum(nbytes[block] for block in part) == pytest.approx(share * total, abs=largest)
    run = begin(model, prompts, share=0.0)
    ids_of(run)
    assert run.statistics().cpu_share == 0.0
    run = begin(model, prompts, share=1.0, new=40)
    ids_of(run)
    used = sum(nbytes[block.id] for block in machinery.layout.blocks[1:] if block.id not in machinery.tables)
    assert run.statistics().cpu_share == pytest.approx(total / used, rel=0.1)


def test_prompts_of_different_ends(model: Any, resident: Any) -> None:
    """Some stop at a token: batches shrink, with keys and values in either memory."""
    prompts, counts = ragged(*[10] * 9, 6, 14), [3, 20, 5, 20, 4, 20, 6, 3, 20, 20, 5]
    free = alone(resident, prompts, new=20, do_sample=False)
    end = Counter(token for ids in free for token in ids[4:]).most_common(1)[0][0]
    model.generation_config.eos_token_id = end
    try:
        found = list(begin(model, prompts, rows=4, lanes=3, new=counts))
    finally:
        model.generation_config.eos_token_id = None
    for done, ids, count in zip(found, free, counts, strict=True):
        expected = ids[:count]
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        assert done.ids == expected
    assert any(done.finish == "stop" for done in found)
    assert calls(model) > 0


def test_sampling_is_the_same(model: Any) -> None:
    prompts = ragged(5, 9, 12, 12, 7)
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.9)
    expected = ids_of(begin(model, prompts, share=0.0, sampling=sampling))
    assert ids_of(begin(model, prompts, lanes=3, sampling=sampling)) == expected


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_an_exception_ends_all_and_leaves_the_model_working(model: Any, resident: Any, where: str) -> None:
    prompts = ragged(5, 5, 9, 9, 7, 7)
    before = set(threading.enumerate())
    there = {unit.path for unit in model.penstock._machinery.units.units}
    path = next(
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers.2" in path and (path in there) is (where == "cpu")
    )
    seen: list[int] = []

    def fail(_: Any, args: Any) -> None:
        if args[0].shape[1] == 1:
            seen.append(1)
            if len(seen) == 5:
                raise RuntimeError("out of luck")

    handle = model.get_submodule(path).register_forward_pre_hook(fail)
    try:
        with pytest.raises(penstock.PenstockError, match=r"prompts? .*RuntimeError: out of luck"):
            ids_of(begin(model, prompts, lanes=3))
        assert wait_for_threads(before) == set()
        check_at_rest(model)
    finally:
        handle.remove()
    assert ids_of(begin(model, prompts, lanes=3)) == alone(resident, prompts, do_sample=False)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_run_that_nobody_reads_ends(model: Any, resident: Any, how: str) -> None:
    before = set(threading.enumerate())
    run = begin(model, ragged(5, 9, 12, 7), new=100, rows=1, lanes=4)
    while calls(model) < 20:
        time.sleep(0.001)
    if how == "close":
        run.close()
        assert list(run) == []
    else:
        del run
        gc.collect()
    assert wait_for_threads(before) == set()
    check_at_rest(model)
    assert ids_of(begin(model, ragged(5, 9))) == alone(resident, ragged(5, 9), do_sample=False)


def test_closing_the_model_ends_the_run(saved: Callable[[str], Path]) -> None:
    before = set(threading.enumerate())
    with computed(saved("llama"), every_other) as model:
        run = begin(model, ragged(5, 9, 12, 7), new=110, rows=1, lanes=3)
        while run.statistics().tokens < 8:
            time.sleep(0.001)
        penstock.close(model)
        with pytest.raises(penstock.ClosedError):
            list(run)
    assert wait_for_threads(before) - before == set()


def test_weights_looked_at_meanwhile(model: Any, resident: Any) -> None:
    """A thread that is no lane gathers layers: what the CPU cannot have then is computed on the device."""
    prompts = ragged(*LENGTHS)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for layer in model.model.layers:
                with model.penstock.gathered(layer.mlp):
                    pass

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert ids_of(begin(model, prompts, lanes=3)) == alone(resident, prompts, do_sample=False)
    finally:
        done.set()
        looking.join(60)
    check_at_rest(model)


def test_other_calls_wait_and_use_both_processors(model: Any, resident: Any) -> None:
    prompts = ragged(5, 9, 12, 7)
    run = begin(model, prompts, rows=1, lanes=2)
    expected = alone(resident, prompts, do_sample=False)
    assert alone(model, prompts[:2], do_sample=False) == expected[:2]
    assert ids_of(run) == expected
