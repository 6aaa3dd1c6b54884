"""Parts of a model computed on the CPU from host memory: the same bits on the emulated device, and nothing copied."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Inputs, differences, load_resident, token_ids
from zoo.budgets import DEVICES, PLENTY, find_budget

import penstock
from penstock.api import link_cache
from penstock.arguments import wanted_of
from penstock.devices import open_device
from penstock.runtime import loading, offloading
from penstock.runtime.build import Machinery
from penstock.runtime.layout import Layout
from penstock.scheduler.processors import ALWAYS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Processors = Callable[[nn.Module, Layout], Mapping[int, int]]
MODELS = ("llama", "llama-bf16", "gemma3", "qwen3", "gpt2", "falcon", "mixtral", "qwen3-moe", "mamba", "t5", "bart")
"""Among them sliding windows, a tied table, experts, states without keys, and an encoder with a decoder."""
FEW = 3
"""More than the two sequences of a prompt have rows while they are decoded, less than the prompt has."""


def below(rows: int) -> Processors:
    """All that stays in host memory, in calls of fewer rows."""

    def choose(_: nn.Module, layout: Layout) -> dict[int, int]:
        assert layout.back is not None
        return dict.fromkeys(layout.back.resident, rows)

    return choose


def every_other(_: nn.Module, layout: Layout) -> dict[int, int]:
    """Half of what stays in host memory, in calls of few rows."""
    assert layout.back is not None
    return dict.fromkeys(sorted(layout.back.resident)[::2], FEW)


def place(folder: Path, budget: dict[str, int], device: str, processors: Processors | None = None) -> Any:
    return loading.load(
        folder,
        wanted=wanted_of(budget),
        device=open_device(device),
        dtype="auto",
        disk=(),
        context=None,
        batch=None,
        trust_remote_code=False,
        cache=link_cache(),
        processors=processors,
    )


@cache
def budget(folder: Path, level: str) -> Mapping[str, int]:
    """Of both tiers."""
    return find_budget(partial(place, folder), "emulated", level)


@contextmanager
def computed(
    folder: Path, processors: Processors | None, *, level: str = "nothing", host: int = PLENTY
) -> Iterator[Any]:
    """A model on the emulated device, streamed from host memory."""
    limits = {"device": budget(folder, level)["device"], "host": host}
    model = place(folder, limits, DEVICES["emulated"], processors)
    try:
        yield model
    finally:
        penstock.close(model)


def calls(model: Any) -> int:
    """Calls that the CPU computed."""
    on_cpu = model.penstock._machinery.session.on_cpu
    return 0 if on_cpu is None else int(on_cpu.computed)


def check_at_rest(model: Any) -> None:
    """Nothing is leased but the small tensors, and nothing is bound."""
    machinery = model.penstock._machinery
    for tier in (machinery.front, machinery.back):
        assert {block for block, held in tier.holding.items() if held.leases} <= {0}
    for block, binding in machinery.bindings.items():
        assert binding.uses == (block == 0)
        assert not binding.on_cpu


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints, each written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            ZOO[name].save(folder / name)
        return folder / name

    return find


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(saved: Callable[[str], Path], name: str) -> None:
    folder = saved(name)
    expected = ZOO[name].run(load_resident(folder))
    for rows in (FEW, ALWAYS):
        with computed(folder, below(rows)) as model:
            for attempt in ("as guessed", "as learned"):
                assert differences(expected, ZOO[name].run(model)) == [], (rows, attempt)
            assert calls(model) > 0
            check_at_rest(model)


@pytest.mark.parametrize("rows", [0, 2])
def test_thresholds_that_no_call_stays_below(saved: Callable[[str], Path], rows: int) -> None:
    folder = saved("llama")
    with computed(folder, below(rows)) as model:
        assert differences(ZOO["llama"].run(load_resident(folder)), ZOO["llama"].run(model)) == []
        assert calls(model) == 0
        assert bool(model.penstock.plan.on_cpu()) is (rows > 0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_units_and_streamed_blocks_take_turns(saved: Callable[[str], Path], name: str) -> None:
    """Of every layer some matrices are computed on the CPU, and the rest of the host memory's is copied."""
    folder = saved(name)
    expected = ZOO[name].run(load_resident(folder))
    for level in ("nothing", "half"):
        with computed(folder, every_other, level=level) as model:
            for _ in range(2):
                assert differences(expected, ZOO[name].run(model)) == []
            assert calls(model) > 0
            check_at_rest(model)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beside_a_disk_that_is_read(saved: Callable[[str], Path], name: str) -> None:
    """Host memory holds half: that half is computed there, and is not exchanged for what decoding reads."""
    folder = saved(name)
    expected = ZOO[name].run(load_resident(folder))
    host = budget(folder, "nothing")["host"] + 400_000
    with computed(folder, below(FEW), host=host) as model:
        plan = model.penstock.plan
        assert plan.blocks_at("disk")
        assert plan.on_cpu()
        for _ in range(3):
            assert differences(expected, ZOO[name].run(model)) == []
        there = model.penstock._machinery.back.permanent
        assert {block.id for block in plan.on_cpu()} <= there.keys()
        check_at_rest(model)


MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_caches_of_all_kinds(saved: Callable[[str], Path], name: str) -> None:
    folder = saved(name)

    def generate(model: Any, mode: str) -> Tensor:
        torch.manual_seed(3)
        tokens: Tensor = model.generate(**ZOO[name].inputs(), max_new_tokens=6, **MODES[mode])
        return tokens

    resident = load_resident(folder)
    with computed(folder, below(2 * FEW + 1)) as model:
        for mode in MODES:
            before = calls(model)
            assert torch.equal(generate(model, mode), generate(resident, mode)), mode
            assert calls(model) > before


def copied_blocks(model: Any) -> list[tuple[int, int]]:
    """When each copy to the device began, and of which block."""
    return [(r.start_ns, r.block) for r in model.penstock.timeline.records() if r.kind == "copy"]


def settle(model: Any) -> int:
    """Wait until nothing is on its way to the device any more; the bytes copied so far."""
    quiet, deadline = 0, time.monotonic() + 10
    while quiet < 3 and time.monotonic() < deadline:
        quiet = 0 if model.penstock._machinery.front.arriving else quiet + 1
        time.sleep(0.005)
    assert quiet == 3, "copies did not come to an end"
    return int(model.penstock.statistics().h2d_nbytes)


class Tokens:
    """A streamer that notes how much had been copied at each token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.copied: list[int] = []

    def put(self, _: Tensor) -> None:
        self.copied.append(settle(self.model))

    def end(self) -> None:
        pass


def test_the_prompt_on_the_device_and_tokens_on_the_cpu(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    one = {"input_ids": token_ids(batch=1)}
    expected = load_resident(folder).generate(**one, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    with computed(folder, below(FEW)) as model:
        plan = model.penstock.plan
        assert plan.link_nbytes_per_sweep == 0
        layers = sum(block.nbytes for block in plan.on_cpu() if "layers" in block.name)
        for _ in range(2):
            tokens = Tokens(model)
            before = settle(model)
            assert torch.equal(model.generate(**one, max_new_tokens=8, do_sample=False, streamer=tokens), expected)
            _, prompt, second, third, *later = tokens.copied
            assert prompt - before >= layers - plan.slots * plan.slot_nbytes, "the prompt was not on the device"
            # What followed a call last time is fetched ahead: another prompt, after the first token of an answer.
            assert third - prompt <= 2 * plan.slots * plan.slot_nbytes, (prompt, second, third)
            assert set(later) == {third}, "decoding copied blocks"


def test_what_the_cpu_computes_is_never_fetched_between_tokens(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    one = {"input_ids": token_ids(batch=1)}
    with computed(folder, every_other) as model:
        here = {block.id for block in model.penstock.plan.on_cpu()}
        assert 0 < len(here) < len(model.penstock.plan.blocks) - 1
        model.generate(**one, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            state = model(**one, use_cache=True).past_key_values
            following = {"input_ids": torch.tensor([[7]]), "past_key_values": state}
            model(**following)
            model(**following)
            settle(model)  # of what followed last time, which was a prompt
            since = time.monotonic_ns()
            for _ in range(4):
                model(**following)
        later = [block for began, block in copied_blocks(model) if began >= since]
        assert later
        assert not here & set(later)


def test_always_on_the_cpu_needs_no_copy_at_all(saved: Callable[[str], Path]) -> None:
    with computed(saved("llama"), below(ALWAYS)) as model:
        ZOO["llama"].run(model)
        assert {block for _, block in copied_blocks(model)} <= {0}
        assert "computed on the CPU" in str(penstock.explain(model))
        statistics = model.penstock.statistics().executor
        assert statistics.on_cpu > 0
        assert statistics.wasted == 0


def test_an_answer_goes_on_with_a_prompt(saved: Callable[[str], Path]) -> None:
    """Device, CPU, device, CPU: each takes the keys and values over."""
    folder = saved("gemma3")

    def talk(model: Any) -> list[Tensor]:
        state, found = None, []
        with torch.inference_mode():
            for seed, length in ((1, 9), (2, 1), (3, 1), (4, 7), (5, 1)):
                ids = token_ids(seed=seed, batch=1, length=length)
                out = model(input_ids=ids, past_key_values=state, use_cache=True)
                state = out.past_key_values
                found.append(out.logits.clone())
        return found

    expected = talk(load_resident(folder))
    with computed(folder, below(FEW)) as model:
        for a, b in zip(expected, talk(model), strict=True):
            assert torch.equal(a, b)
        assert calls(model) > 0


def test_gradients_and_training_keep_to_the_device(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")

    def gradient(model: Any) -> Tensor:
        inner = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
        model(inputs_embeds=inner).logits.square().mean().backward()
        assert inner.grad is not None
        return inner.grad

    with computed(folder, None) as model:
        expected = gradient(model)
    with computed(folder, below(ALWAYS)) as model:
        assert torch.equal(gradient(model), expected)
        assert calls(model) == 0
        model.model.train()  # dropout would draw from another generator
        with torch.no_grad():
            model.model(token_ids())
        assert calls(model) == 0


@pytest.mark.parametrize(("name", "rows"), [("gpt2", FEW), ("u-net", ALWAYS)])
def test_modules_that_were_built_already(name: str, rows: int) -> None:
    entry = ZOO[name]
    expected = entry.run(entry.build())

    def offload(budget: dict[str, int], device: str, processors: Processors | None = None) -> Any:
        return offloading.offload(
            entry.build(),
            wanted=wanted_of(budget),
            device=open_device(device),
            disk=(),
            context=None,
            batch=None,
            cache=link_cache(),
            processors=processors,
        )

    device = find_budget(offload, "emulated", "half")["device"]
    model = offload({"device": device, "host": PLENTY}, DEVICES["emulated"], below(rows))
    try:
        for _ in range(2):
            assert differences(expected, entry.run(model)) == []
        assert calls(model) > 0
        check_at_rest(model)
    finally:
        penstock.close(model)


# --- when something goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_cpu_leaves_nothing_behind(saved: Callable[[str], Path], error: type[BaseException]) -> None:
    folder = saved("llama")
    expected = ZOO["llama"].run(load_resident(folder))

    def fail(*_: Any) -> None:
        raise error("stop here")

    with computed(folder, below(ALWAYS)) as model:
        handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        for _ in range(3):
            with pytest.raises(error, match="stop here"):
                ZOO["llama"].sweep(model)
            check_at_rest(model)
        handle.remove()
        assert differences(expected, ZOO["llama"].run(model)) == []


def test_a_weight_changed_on_the_cpu(saved: Callable[[str], Path]) -> None:
    def change(module: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            module.weight.add_(0)  # type: ignore[operator]

    with computed(saved("llama"), below(ALWAYS)) as model:
        layer = model.model.layers[1]
        for part in (layer.mlp.up_proj, layer.input_layernorm):
            handle = part.register_forward_pre_hook(change)
            with pytest.raises(penstock.ReadOnlyWeightError, match=r"lent for reading"):
                ZOO["llama"].sweep(model)
            handle.remove()
            check_at_rest(model)
        ZOO["llama"].sweep(model)


def test_a_drive_that_fails_raises_in_the_caller(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    expected = ZOO["llama"].run(load_resident(folder))

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        start = Machinery.start

        def start_then_fail(self: Machinery, module: nn.Module) -> None:
            patch.setattr(self.session, "lend", lambda *_, **__: None)  # the small tensors
            patch.setattr(os, "preadv", broken)
            start(self, module)

        patch.setattr(Machinery, "start", start_then_fail)
        limits = {"device": budget(folder, "nothing")["device"], "host": PLENTY}
        model = place(folder, limits, DEVICES["emulated"], below(ALWAYS))
        with pytest.raises(penstock.DiskError, match=r"offset \d+ of .*safetensors"):
            ZOO["llama"].sweep(model)
    model.penstock._machinery.session.lend(0, observed=False)
    try:
        check_at_rest(model)
        assert differences(expected, ZOO["llama"].run(model)) == []
    finally:
        penstock.close(model)


def test_closed_while_the_cpu_computes(saved: Callable[[str], Path]) -> None:
    there, go_on = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def stay(*_: Any) -> None:
        there.set()
        assert go_on.wait(60)

    with computed(saved("llama"), below(ALWAYS)) as model:
        model.model.layers[2].mlp.register_forward_pre_hook(stay)

        def work() -> None:
            try:
                ZOO["llama"].sweep(model)
            except BaseException as error:
                raised.append(error)

        computing = threading.Thread(target=work)
        computing.start()
        assert there.wait(60)
        closing = threading.Thread(target=penstock.close, args=(model,))
        closing.start()
        closing.join(0.2)
        go_on.set()
        for thread in (computing, closing):
            thread.join(60)
            assert not thread.is_alive()
        assert [type(error) for error in raised] == [penstock.ClosedError]
        with pytest.raises(penstock.ClosedError):
            ZOO["llama"].sweep(model)


def test_gathered_while_the_cpu_computes(saved: Callable[[str], Path]) -> None:
    """The weights are the CPU's until it is done; the copies come after it, and nobody gets the other's."""
    folder = saved("llama")
    truth: Any = load_resident(folder)
    expected = ZOO["llama"].sweep(truth)
    with computed(folder, below(ALWAYS)) as model:
        layer = model.model.layers[2]
        found: list[bool] = []

        def look() -> None:
            with model.penstock.gathered(layer):
                pass

        def from_elsewhere(*_: Any) -> None:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(60)
            found.append(not thread.is_alive())

        handle = layer.mlp.register_forward_pre_hook(from_elsewhere)
        assert differences(expected, ZOO["llama"].sweep(model)) == []
        handle.remove()
        assert found == [True]
        with model.penstock.gathered(layer):
            assert torch.equal(layer.mlp.up_proj.weight, truth.model.layers[2].mlp.up_proj.weight)
            assert differences(expected, ZOO["llama"].sweep(model)) == []
        check_at_rest(model)


def test_a_use_on_the_device_waits_for_the_cpu(saved: Callable[[str], Path]) -> None:
    """Two threads, one module: what is lent from the host is not lent from the device at the same time."""
    with computed(saved("llama"), below(ALWAYS)) as model:
        session = model.penstock._machinery.session
        layer = model.model.layers[2]
        block = next(b.id for b in model.penstock.plan.on_cpu() if b.name.startswith("model.layers.2."))
        lent: list[bool] = []

        def lend() -> None:
            lease = session.lend(block, observed=False)
            lent.append(session.bindings[block].on_cpu)
            session.take_back(lease)

        thread = threading.Thread(target=lend)

        def start(*_: Any) -> None:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive(), "lent from both tiers at once"

        handle = layer.mlp.register_forward_pre_hook(start)
        ZOO["llama"].sweep(model)
        handle.remove()
        thread.join(60)
        assert lent == [False]
        check_at_rest(model)


def test_an_argument_of_unknown_kind_keeps_a_layer_on_the_device(
    saved: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Strange:
        pass

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "strange": Strange()}

    folder = saved("llama")
    expected = ZOO["llama"].run(load_resident(folder))
    with computed(folder, below(ALWAYS)) as model:
        model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True)
        assert differences(expected, ZOO["llama"].run(model)) == []
        assert "model.layers.1 is computed on the device after all: it is given a Strange" in caplog.text
        assert len([r for r in caplog.records if "after all" in r.message]) == 1


def test_a_forgotten_model_is_freed(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    limits = {"device": budget(folder, "nothing")["device"], "host": PLENTY}
    model = place(folder, limits, DEVICES["emulated"], below(FEW))
    ZOO["llama"].run(model)
    layer = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None


def test_inputs_changed_in_place_are_changed_for_the_caller(saved: Callable[[str], Path]) -> None:
    """A layer may write into what it is given; a hook of the layer's own sees it where the layer computes."""

    def write(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].mul_(2)

    def double(model: Any, inputs: Inputs) -> dict[str, Tensor]:
        model.model.layers[1].input_layernorm.register_forward_pre_hook(write)
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        return {"logits": out.logits, **{str(i): h for i, h in enumerate(out.hidden_states)}}

    folder = saved("llama")
    expected = double(load_resident(folder), ZOO["llama"].inputs())
    with computed(folder, below(ALWAYS)) as model:
        assert differences(expected, double(model, ZOO["llama"].inputs())) == []


def test_two_threads_and_one_that_looks(saved: Callable[[str], Path]) -> None:
    """Long prompts and short ones, the weights looked at meanwhile: nobody gets what another one was lent."""
    folder = saved("llama")
    resident: Any = load_resident(folder)
    prompts = [token_ids(seed=seed, batch=1, length=length) for seed, length in ((31, 2), (32, 11))]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [resident.generate(ids, **options) for ids in prompts]
    wrong: list[str] = []
    done = threading.Event()

    with computed(folder, below(FEW)) as model:

        def answer(i: int) -> None:
            for _ in range(4):
                if not torch.equal(model.generate(prompts[i], **options), expected[i]):
                    wrong.append(f"prompt {i}")

        def look() -> None:
            while not done.is_set():
                for layer in model.model.layers:
                    with model.penstock.gathered(layer.mlp):
                        pass

        workers = [threading.Thread(target=answer, args=(i,)) for i in range(2)]
        looking = threading.Thread(target=look)
        for thread in (*workers, looking):
            thread.start()
        for thread in workers:
            thread.join(100)
        done.set()
        looking.join(60)
        assert not any(thread.is_alive() for thread in (*workers, looking))
        assert wrong == []
        check_at_rest(model)


# --- what is a unit -----------------------------------------------------------------------------------------------


def units(model: Any) -> list[str]:
    return [unit.path for unit in model.penstock._machinery.units.units]


def test_units_are_the_largest_modules_that_can_be(saved: Callable[[str], Path]) -> None:
    with computed(saved("llama"), below(FEW)) as model:
        assert units(model) == [f"model.layers.{i}" for i in range(5)]
        assert any("equal the device's to rounding" in note for note in model.penstock.plan.notes)
    with computed(saved("llama"), every_other) as model:
        assert "model.layers.0.self_attn.q_proj" in units(model)
        assert "model.layers.0" not in units(model)
    with computed(saved("vit"), below(ALWAYS)) as model:
        assert len([path for path in units(model) if "layer" in path]) == 4, "a stack of layers is no unit"


def test_what_no_unit_can_be_made_of_is_said(saved: Callable[[str], Path]) -> None:
    with computed(saved("opt"), below(FEW)) as model:
        assert any("several modules use the same weights" in note for note in model.penstock.plan.notes)
    with computed(saved("mixtral"), below(FEW)) as model:
        assert any("aligned otherwise" in note for note in model.penstock.plan.notes)
        refused = {b.id for b in model.penstock.plan.blocks if b.home == "host" and b.processor == "device"}
        assert refused
        # of experts only those are copied that a token asks for
        assert (
            0
            < model.penstock.plan.link_nbytes_per_sweep
            <= sum(b.nbytes for b in model.penstock.plan.blocks if b.id in refused)
        )
