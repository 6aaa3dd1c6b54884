"""`generate()` and its surroundings, unchanged on a streamed model."""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from zoo import ZOO, differences, llama_config, load_resident, prompt, token_ids
from zoo.budgets import DEVICES, find_budget, streamed

import penstock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def place(folder: Path, budget: dict[str, int], device: str) -> Any:
    return penstock.load(folder, max_memory=budget, device=device)


def generate(model: Any, inputs: dict[str, Tensor] | None = None, *, tokens: int = 8, **options: Any) -> Tensor:
    """Tokens for the padded prompt, seeded."""
    torch.manual_seed(11)
    # The resident model would compile itself for a static cache, and compiled code rounds in its own way.
    result: Tensor = model.generate(**(inputs or prompt()), max_new_tokens=tokens, disable_compile=True, **options)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One checkpoint, resident and streamed."""

    folder: Path
    resident: Any
    streamed: Any


@pytest.fixture(scope="module", params=["llama-cpu", "llama-emulated", "t5-cpu", "t5-emulated"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, device = request.param.split("-")
    folder = ZOO[name].save(tmp_path_factory.mktemp("checkpoint") / name)
    with streamed(partial(place, folder), device=device) as model:
        yield Pair(folder=folder, resident=load_resident(folder), streamed=model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint with a tokenizer."""
    where = ZOO["llama"].save(tmp_path_factory.mktemp("checkpoint") / "llama")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = [str(transformers.__doc__), Path(threading.__file__).read_text()]
    special = ["<pad>", "<s>", "<unk>"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(where)
    return where


@pytest.fixture
def llama(folder: Path) -> Iterator[Any]:
    """A fresh streamed Llama, for tests that break or close it."""
    with streamed(partial(place, folder)) as model:
        yield model


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_resident_model(pair: Pair, mode: str) -> None:
    expected = generate(pair.resident, **MODES[mode])
    assert torch.equal(generate(pair.streamed, **MODES[mode]), expected)
    assert torch.equal(generate(pair.streamed, **MODES[mode]), expected), "in the learned order"


def test_static_cache_is_not_compiled(pair: Pair) -> None:
    """generate() compiles by itself for a static cache; a streamed model must not be traced, asked or unasked."""
    inputs = prompt()
    tokens = pair.streamed.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(tokens, generate(pair.resident, tokens=4, do_sample=False, cache_implementation="static"))


def test_streamer_gets_every_token(pair: Pair) -> None:
    got: list[int] = []

    class Streamer:
        ended = False

        def put(self, value: Tensor) -> None:
            got.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    one = {key: value[:1] for key, value in prompt().items()}
    tokens = generate(pair.streamed, one, do_sample=False, streamer=streamer)
    assert got == tokens[0].tolist()
    assert streamer.ended


def test_text_iterator_streamer_across_threads(llama: Any, folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    one = tokenizer("the thread waits", return_tensors="pt", return_token_type_ids=False)
    options = {**one, "max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=llama.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    tokens = load_resident(folder).generate(**options)  # type: ignore[operator]
    assert text == tokenizer.decode(tokens[0, one["input_ids"].shape[1] :])


@pytest.mark.parametrize("draft_streams", [False, True])
def test_assisted_generation(llama: Any, folder: Path, tmp_path: Path, draft_streams: bool) -> None:
    torch.manual_seed(5)
    draft: Any = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=2))
    draft.save_pretrained(tmp_path / "draft", max_shard_size="300KB")
    resident, small = load_resident(folder), load_resident(tmp_path / "draft")
    one = {"input_ids": token_ids(batch=1), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    expected = generate(resident, one, do_sample=False, assistant_model=small)
    if not draft_streams:
        assert torch.equal(generate(llama, one, do_sample=False, assistant_model=small), expected)
        return
    with streamed(partial(place, tmp_path / "draft")) as streamed_draft:
        for _ in range(2):
            assert torch.equal(generate(llama, one, do_sample=False, assistant_model=streamed_draft), expected)


def test_pipeline(llama: Any, folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for model in (load_resident(folder), llama):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        answers.append(pipe(["a lock is", "daemon"], max_new_tokens=5, do_sample=False))
    assert answers[0] == answers[1]


def test_state_dict_streams_the_real_weights(pair: Pair) -> None:
    expected = pair.resident.state_dict()
    state = pair.streamed.state_dict()
    assert list(state) == list(expected)
    assert differences(expected, dict(state.items())) == []


def test_save_pretrained_writes_the_real_weights(pair: Pair, tmp_path: Path) -> None:
    pair.streamed.save_pretrained(tmp_path / "copy", max_shard_size="500KB")
    again = load_resident(tmp_path / "copy")
    assert differences(pair.resident.state_dict(), again.state_dict()) == []
    # Saving borrowed every weight; the model still streams, and streams the right thing.
    assert torch.equal(generate(pair.streamed, do_sample=False), generate(pair.resident, do_sample=False))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
    ],
    ids=["to dtype", "to device", "half", "float", "double"],
)
def test_moving_is_refused_with_the_remedy(pair: Pair, move: Any) -> None:
    with pytest.raises(penstock.PenstockError, match=r"dtype=|device=|max_memory"):
        move(pair.streamed)
    assert torch.equal(generate(pair.streamed, do_sample=False), generate(pair.resident, do_sample=False))


def test_parameters_keep_their_looks_between_leases(pair: Pair) -> None:
    expected = dict(pair.resident.named_parameters())
    actual = dict(pair.streamed.named_parameters())
    assert list(actual) == list(expected)
    assert pair.streamed.dtype == pair.resident.dtype
    assert pair.streamed.device.type == "cpu"
    for name, parameter in actual.items():
        assert parameter.shape == expected[name].shape
        assert parameter.dtype == expected[name].dtype
        assert not parameter.requires_grad
    assert any(bool(parameter.isnan().all()) for parameter in actual.values()), "nothing streams"


def test_gathered_lends_real_weights(pair: Pair) -> None:
    stack = pair.streamed.decoder.block if hasattr(pair.streamed, "decoder") else pair.streamed.model.layers
    truth = pair.resident.decoder.block if hasattr(pair.resident, "decoder") else pair.resident.model.layers
    for i in range(len(stack)):
        with pair.streamed.penstock.gathered(stack[i]):
            lent = {name: parameter.detach().clone() for name, parameter in stack[i].named_parameters()}
            again = {name: nn.Parameter(parameter) for name, parameter in stack[i].named_parameters()}
            assert differences(again, lent) == []
        assert differences(dict(truth[i].named_parameters()), dict(lent)) == []


def test_two_threads_get_right_answers(pair: Pair) -> None:
    prompts = [{**prompt(), "input_ids": token_ids(seed=seed)} for seed in (21, 22)]
    expected = [generate(pair.resident, one, do_sample=False) for one in prompts]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = pair.streamed.generate(**prompts[i], max_new_tokens=8, do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert [torch.equal(found[i], expected[i]) for i in range(2)] == [True, True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_model_works_again_after_an_exception_inside(pair: Pair, error: type[BaseException], when: str) -> None:
    layers = pair.streamed.decoder.block if hasattr(pair.streamed, "decoder") else pair.streamed.model.layers

    def fail(*_: Any) -> None:
        raise error("stop here")

    hook = layers[1].register_forward_pre_hook if when == "before" else layers[1].register_forward_hook
    handle = hook(fail)
    try:
        for _ in range(3):
            with pytest.raises(error, match="stop here"):
                generate(pair.streamed, do_sample=False)
    finally:
        handle.remove()
    assert torch.equal(generate(pair.streamed, do_sample=False), generate(pair.resident, do_sample=False))


def wait_for_threads(before: set[threading.Thread]) -> set[threading.Thread]:
    """The threads that are new since `before` and still alive after at most five seconds."""
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def open_fresh(folder: Path, device: str) -> Any:
    here = partial(place, folder)
    return here(find_budget(here, device, "nothing"), DEVICES[device])


@pytest.mark.parametrize("device", DEVICES)
def test_closed_model_refuses_and_leaves_no_thread(folder: Path, device: str) -> None:
    before = set(threading.enumerate())
    files = set(os.listdir("/proc/self/fd"))
    model = open_fresh(folder, device)
    generate(model, do_sample=False)
    penstock.close(model)
    penstock.close(model)
    with pytest.raises(penstock.ClosedError):
        generate(model, do_sample=False)
    assert wait_for_threads(before) == set()
    assert set(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("device", DEVICES)
def test_forgotten_model_stops_its_threads(folder: Path, device: str) -> None:
    before = set(threading.enumerate())
    model = open_fresh(folder, device)
    generate(model, do_sample=False)
    del model
    gc.collect()
    assert wait_for_threads(before) == set()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_is_refused(llama: Any) -> None:
    expected = generate(llama, do_sample=False)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # In the child: report the name of what is raised, and leave without running the parent's exit handlers.
        try:
            llama(**prompt())
            said = b"nothing"
        except BaseException as error:
            said = type(error).__name__.encode()
        os.write(writer, said)
        os._exit(0)
    os.close(writer)
    # A child that does compute may hang for ever: the parent's OpenMP threads are not there.
    ready, _, _ = select.select([reader], [], [], 20)
    said = os.read(reader, 100) if ready else b"a hang"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert said == b"ForkError"
    assert torch.equal(generate(llama, do_sample=False), expected)


def test_gradient_of_the_inputs_is_the_resident_one() -> None:
    def place_skips(budget: dict[str, int], device: str) -> Any:
        return penstock.offload(ZOO["u-net"].build().requires_grad_(False), max_memory=budget, device=device)

    def gradient(model: Any) -> tuple[Tensor, Tensor]:
        x = ZOO["u-net"].inputs()["x"].requires_grad_()
        loss = model(x).square().mean()
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    loss, expected = gradient(ZOO["u-net"].build().requires_grad_(False))
    with streamed(place_skips) as model:
        for _ in range(2):
            streamed_loss, actual = gradient(model)
            assert torch.equal(streamed_loss, loss)
            assert torch.equal(actual, expected)


def test_changing_a_streamed_parameter_raises(llama: Any, folder: Path) -> None:
    expected = generate(load_resident(folder), do_sample=False)
    layer = llama.model.layers[2]

    def change(module: Any, *_: Any) -> None:
        with torch.no_grad():
            module.self_attn.q_proj.weight.mul_(2.0)

    handle = layer.register_forward_hook(change)
    with pytest.raises(penstock.ReadOnlyWeightError, match=r"q_proj"):
        generate(llama, do_sample=False)
    handle.remove()
    assert torch.equal(generate(llama, do_sample=False), expected), "the change did not stay"


def test_explain_says_where_things_are(pair: Pair) -> None:
    text = str(penstock.explain(pair.streamed))
    for word in ("host", "disk"):
        assert word in text
    assert hasattr(penstock.explain(pair.streamed), "_repr_html_")
