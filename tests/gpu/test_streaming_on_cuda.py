"""Streamed on CUDA against resident on CUDA: the same bits, whatever stays where, and whoever races with whom."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry, Inputs, Outputs, differences, load_resident, token_ids
from zoo.budgets import PLENTY, find_budget, find_limits

import penstock

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MODELS = ("llama", "llama-bf16", "llama-wide-vocabulary", "gpt2", "t5", "t5-gated-bf16", "u-net")
"""Among them a tied table, an encoder with a decoder, and skips past layers that lie between."""
PRETRAINED = tuple(name for name in MODELS if ZOO[name].pretrained)
LEVELS = ("nothing", "half", "all but one")
HOMES = ("host", "disk")
WIDTH, LAYERS = 64, 48
BUSY = 2_000_000
"""Clock cycles before each use of a weight: about a millisecond, in which a wrong copy would overtake it."""

Place = Callable[[dict[str, int], str], Any]


def moved(inputs: Inputs) -> dict[str, Tensor]:
    return {key: value.cuda() for key, value in inputs.items()}


def teach(model: Any, inputs: Inputs) -> Outputs:
    return {"logits": model(**inputs, decoder_input_ids=token_ids(seed=5, length=6).cuda()).logits}


@cache
def on_cuda(name: str) -> Entry:
    """An entry of the zoo whose inputs are on the device."""
    entry = ZOO[name]
    forward = teach if name.startswith("t5") else entry.forward
    return replace(entry, inputs=lambda: moved(entry.inputs()), forward=forward)


def budget(place: Place, level: str, home: str) -> dict[str, int]:
    """Device memory at a level, and what is not there in pinned host memory or on disk."""
    on_device = find_budget(place, "cuda", level)["device"]
    if home == "host":
        return {"device": on_device, "host": PLENTY}
    return {"device": on_device, "host": find_limits(place, "cuda", "host", {"device": on_device}).needed}


def place_loaded(folder: Path, limits: dict[str, int], device: str) -> Any:
    return penstock.load(folder, max_memory=limits, device=device)


def place_offloaded(name: str, limits: dict[str, int], device: str) -> Any:
    return penstock.offload(ZOO[name].build(), max_memory=limits, device=device)


def check(name: str, model: Any, expected: Outputs) -> None:
    """Right three times: in the guessed order, in the learned one, and across the boundary of runs."""
    try:
        assert not model.penstock.plan.resident
        for attempt in range(3):
            assert differences(expected, on_cuda(name).run(model)) == [], attempt
        assert model.penstock.statistics().h2d_nbytes > 0 or not model.penstock.plan.link_nbytes_per_sweep
    finally:
        penstock.close(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: ZOO[name].save(root / name))


@cache
def built_answer(name: str) -> Outputs:
    return on_cuda(name).run(ZOO[name].build().cuda())


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PRETRAINED)
def test_loaded_model_is_bit_equal(name: str, level: str, home: str, folders: Callable[[str], Path]) -> None:
    expected = on_cuda(name).run(load_resident(folders(name)).cuda())
    place = partial(place_loaded, folders(name))
    check(name, place(budget(place, level, home), "cuda"), expected)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_offloaded_module_is_bit_equal(name: str, level: str, home: str) -> None:
    place = partial(place_offloaded, name)
    check(name, place(budget(place, level, home), "cuda"), built_answer(name))


@pytest.mark.parametrize("name", ["llama", "u-net"])
def test_module_that_is_on_the_device_already(name: str) -> None:
    limits = budget(partial(place_offloaded, name), "half", "host")
    model = penstock.offload(ZOO[name].build().cuda(), max_memory=limits, device="cuda")
    assert all(buffer.device.type == "cuda" for buffer in model.buffers())
    check(name, model, built_answer(name))


@pytest.mark.parametrize("name", ["llama-bf16", "t5"])
def test_model_that_fits_is_whole_before_its_host_memory_goes(name: str, folders: Callable[[str], Path]) -> None:
    expected = on_cuda(name).run(load_resident(folders(name)).cuda())
    for _ in range(5):
        model = penstock.load(folders(name), max_memory={"device": PLENTY, "host": PLENTY}, device="cuda")
        try:
            assert model.penstock.plan.resident
            assert differences(expected, on_cuda(name).run(model)) == []
        finally:
            penstock.close(model)


def test_sampling_draws_the_same_tokens(folders: Callable[[str], Path]) -> None:
    """Nothing of ours may advance the generator of the device."""

    def sample(model: Any) -> Tensor:
        torch.manual_seed(5)
        inputs = on_cuda("llama").inputs()
        tokens: Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=0)
        return tokens

    place = partial(place_loaded, folders("llama"))
    model = place(budget(place, "nothing", "host"), "cuda")
    try:
        assert torch.equal(sample(model), sample(load_resident(folders("llama")).cuda()))
    finally:
        penstock.close(model)


class Busy(nn.Module):
    """Many small layers, each used late."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.cycles = BUSY

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.cycles:
                torch.cuda._sleep(self.cycles)
            x = x + torch.tanh(layer(x))
        return x


def busy(dtype: torch.dtype = torch.float32) -> Busy:
    torch.manual_seed(3)
    return Busy().to(dtype).requires_grad_(False)


def streamed_busy(home: str = "host", dtype: torch.dtype = torch.float32) -> Any:
    def place(limits: dict[str, int], device: str) -> Any:
        return penstock.offload(busy(dtype), max_memory=limits, device=device)

    return place(budget(place, "nothing", home), "cuda")


def some_input(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("home", HOMES)
def test_copies_never_overtake_slow_kernels(home: str, dtype: torch.dtype) -> None:
    x = some_input(dtype)
    expected = busy(dtype).cuda()(x)
    model = streamed_busy(home, dtype)
    try:
        answers = [model(x) for _ in range(6)]  # none is looked at before the last has been launched
        assert all(torch.equal(answer, expected) for answer in answers)
    finally:
        penstock.close(model)


def test_runs_on_several_streams_do_not_disturb_each_other() -> None:
    x = some_input()
    expected = busy().cuda()(x)
    model = streamed_busy()
    streams = [torch.cuda.Stream() for _ in range(2)]
    try:
        answers = []
        for number in range(6):
            stream = streams[number % 2]
            stream.wait_stream(torch.cuda.default_stream())
            model.cycles = BUSY if number % 2 else 0  # the slow run's weights are refilled for the quick one
            with torch.cuda.stream(stream):
                answers.append(model(x))
        torch.cuda.synchronize()
        assert all(torch.equal(answer, expected) for answer in answers)
    finally:
        penstock.close(model)


def test_threads_with_streams_of_their_own() -> None:
    inputs = [some_input(seed=number) for number in range(2)]
    resident = busy().cuda()
    expected = [resident(x) for x in inputs]
    model = streamed_busy()
    torch.cuda.synchronize()
    answers: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            answers[number] = [model(inputs[number]) for _ in range(4)]
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, one in answers.items():
            assert len(one) == 4
            assert all(torch.equal(answer, expected[number]) for answer in one)
    finally:
        penstock.close(model)


def test_closing_waits_for_kernels_that_still_read() -> None:
    x = some_input()
    expected = busy().cuda()(x)
    model = streamed_busy()
    with torch.cuda.stream(torch.cuda.Stream()):
        answer = model(x)
    penstock.close(model)
    torch.full((2**24,), 0xFF, dtype=torch.uint8, device="cuda")  # takes what close gave back
    assert torch.equal(answer, expected)


def test_input_gradients_are_bit_equal() -> None:
    def gradient(model: Any) -> Tensor:
        x = some_input().requires_grad_(True)
        model(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(busy().cuda())
    model = streamed_busy()
    try:
        assert torch.equal(gradient(model), expected)
    finally:
        penstock.close(model)


def test_hot_path_never_synchronises() -> None:
    x = some_input()
    model = streamed_busy()
    model.cycles = 0
    try:
        expected = [model(x) for _ in range(3)][-1]
        torch.cuda.set_sync_debug_mode("error")
        try:
            answer = model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(answer, expected)
    finally:
        penstock.close(model)


def test_close_gives_device_and_host_memory_back(folders: Callable[[str], Path]) -> None:
    place = partial(place_loaded, folders("llama"))
    limits = budget(place, "half", "host")
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = place(limits, "cuda")
    on_cuda("llama").run(model)
    assert torch.cuda.memory_allocated() - before >= model.penstock.plan.device_nbytes // 2
    machinery = model.penstock._machinery
    assert machinery.host.registered
    device, host = machinery.front_arena.statistics(), machinery.host.statistics()
    assert device.nbytes <= limits["device"]
    assert host.nbytes <= model.penstock.plan.host_nbytes
    penstock.close(model)
    assert not machinery.host.registered
    del machinery, model
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_gathered_lends_real_weights(folders: Callable[[str], Path]) -> None:
    place = partial(place_loaded, folders("llama"))
    resident: Any = load_resident(folders("llama")).cuda()
    model = place(budget(place, "half", "disk"), "cuda")
    try:
        for path, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own and "layers" in path:  # a leaf at a time: a whole layer may be more blocks than there are slots
                with model.penstock.gathered(module):
                    for name, weight in own.items():
                        assert torch.equal(weight, resident.get_submodule(path).get_parameter(name)), (path, name)
    finally:
        penstock.close(model)
