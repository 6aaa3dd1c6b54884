"""A cache and the prefix store: what is read equals what is computed, and what is damaged is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM
from zoo import ZOO

import penstock
from penstock.runtime.foresight import Foresight
from penstock.runtime.kv.identity import identity_of, weights_fingerprint
from penstock.runtime.kv.prefillcosts import calibrated_prefill
from penstock.runtime.kv.prefix import load_prefix, store_prefix
from penstock.runtime.kv.prefixchoice import PrefixCosts
from penstock.runtime.kv.stopwatch import CallStopwatch
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Processor
from penstock.scheduler.kv.prefilltime import MeasuredPrefill
from penstock.scheduler.kv.reuse import ReadTime
from penstock.scheduler.sizes import Workload

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
SIZE = 4
IDS = torch.randint(1, 97, (1, 103), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.arange(9.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with penstock.PrefixStore(tmp_path / "store", "64MiB") as made:
        yield made


@pytest.fixture
def cache_of(model: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(host: str = "128KiB") -> Any:
        budget = {"host": host, "disk": "16MiB"}
        made.append(penstock.TieredCache(model.config, max_memory=budget, block_tokens=SIZE, disk=tmp_path / "kv"))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def identity(model: Any, weights: Path, **kwargs: Any) -> Any:
    return identity_of(weights, model.config, model.dtype, block_tokens=SIZE, **kwargs)


def test_what_is_read_equals_what_is_computed(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any]
) -> None:
    tokens = IDS[0].tolist()
    name = identity(model, weights)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        first = cache_of()
        assert load_prefix(first, store, name, tokens).tokens == 0
        model(input_ids=IDS, past_key_values=first)
        report = store_prefix(first, store, name, tokens)
        assert (report.stored_blocks, report.known_blocks, report.reason) == (25, 0, "")
        assert store_prefix(first, store, name, tokens).stored_blocks == 0
        for host in ("128KiB", "1MiB"):
            cache = cache_of(host)
            loaded = load_prefix(cache, store, name, tokens)
            assert loaded.tokens == cache.get_seq_length() == 100
            got = model(input_ids=IDS[:, 100:], past_key_values=cache).logits
            torch.testing.assert_close(got, expected[:, 100:], atol=1e-5, rtol=0)
            more = model(input_ids=IDS[:, :1], past_key_values=cache).logits
            whole = model(input_ids=torch.cat([IDS, IDS[:, :1]], dim=1)).logits[:, -1:]
            torch.testing.assert_close(more, whole, atol=1e-5, rtol=0)


def test_a_prompt_that_begins_alike_gets_what_is_alike(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any]
) -> None:
    name = identity(model, weights)
    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, IDS[0].tolist())
    other = [*IDS[0, :50].tolist(), 1, 2, 3]
    cache = cache_of()
    assert load_prefix(cache, store, name, other).tokens == 48
    assert load_prefix(cache_of(), store, identity(model, weights, salt="another"), IDS[0].tolist()).tokens == 0
    with pytest.raises(penstock.UsageError, match="has 48 tokens already"):
        load_prefix(cache, store, name, other)


def test_what_is_damaged_is_computed(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any], tmp_path: Path
) -> None:
    tokens, name = IDS[0].tolist(), identity(model, weights)
    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, tokens)
        segment = max((tmp_path / "store").iterdir(), key=lambda file: file.stat().st_size)
        with open(segment, "r+b") as stream:
            stream.seek(segment.stat().st_size // 2)
            stream.write(b"\xff" * 64)
        cache = cache_of()
        loaded = load_prefix(cache, store, name, tokens).tokens
        assert loaded < 100
        got = model(input_ids=IDS[:, loaded:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(input_ids=IDS).logits[:, loaded:], atol=1e-5, rtol=0)


def test_weights_that_change_have_another_name(model: Any, weights: Path, tmp_path: Path) -> None:
    before = weights_fingerprint(weights)
    assert weights_fingerprint(weights) == before
    save_file({"a": torch.arange(9.0) + 1}, weights / "model.safetensors")
    assert weights_fingerprint(weights) != before
    with pytest.raises(penstock.UsageError, match="no safetensors files"):
        weights_fingerprint(tmp_path)
    name = identity(model, weights)
    model.config.rope_parameters = dict(model.config.rope_parameters, rope_theta=5e5)
    assert identity(model, weights).root() != name.root()


def test_layers_that_are_kept_elsewhere_have_no_prefix(weights: Path, store: Any) -> None:
    shape = SHAPE | {"num_hidden_layers": 2}
    config = Gemma2Config(**shape, **HEADS, sliding_window=8)
    cache = penstock.TieredCache(config, max_memory={"host": "1MiB", "disk": 0}, block_tokens=SIZE)
    name = identity_of(weights, config, torch.float32, block_tokens=SIZE)
    with pytest.raises(penstock.UsageError, match="in no tier"):
        load_prefix(cache, store, name, [1, 2, 3])
    cache.close()


class PerToken:
    """Computing that takes as long for every token."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def call_s(self, before: int, tokens: int) -> float:
        return self.seconds * tokens


@pytest.mark.parametrize(
    ("token_s", "rate", "read"),
    [
        (1e-3, 1e9, 100),  # computing takes 100 ms, reading 1 ms
        (1e-9, 1e5, 0),
        (1e-9, None, 100),  # nothing is known of the drive
    ],
)
def test_what_is_faster_computed_is_not_read(
    model: Any,
    weights: Path,
    store: Any,
    cache_of: Callable[..., Any],
    token_s: float,
    rate: float | None,
    read: int,
) -> None:
    tokens, name = IDS[0].tolist(), identity(model, weights)
    costs = PrefixCosts(prefill=PerToken(token_s), reading=None if rate is None else ReadTime(rate=rate))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, tokens)
        assert first.statistics().prefix is None
        before = store.statistics().read_nbytes
        cache = cache_of("1MiB")
        loaded = load_prefix(cache, store, name, tokens, costs=costs)
        assert (loaded.tokens, loaded.hit_tokens, loaded.recomputed_tokens) == (read, 100, 100 - read)
        figures = cache.statistics().prefix
        assert (figures.hit_tokens, figures.read_tokens, figures.recomputed_tokens) == (100, read, 100 - read)
        assert figures.read_nbytes == store.statistics().read_nbytes - before == loaded.read_nbytes
        if rate is not None:
            assert figures.compute_all_s == pytest.approx(103 * token_s)
            assert figures.read_all_s == pytest.approx(3 * token_s + 25 * first_block_nbytes(store, name) / rate)
        got = model(input_ids=IDS[:, read:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[:, read:], atol=1e-5, rtol=0)
        everything = cache_of("1MiB")
        assert load_prefix(everything, store, name, tokens, costs=costs, always_read=True).tokens == 100


def first_block_nbytes(store: Any, name: Any) -> int:
    (place,) = store.lookup(name, IDS[0, : SIZE + 1].tolist()).places
    return int(place.span.nbytes)


def test_a_drive_that_turns_out_slow_is_left(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, name = IDS[0].tolist(), identity(model, weights)
    monkeypatch.setattr("penstock.runtime.kv.arriving.AT_ONCE", 1)  # a block at a time
    plain = store.read

    def slow(hit: Any, into: Any, **how: Any) -> int:
        time.sleep(0.02)
        return int(plain(hit, into, **how))

    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, tokens)
        monkeypatch.setattr(store, "read", slow)
        costs = PrefixCosts(prefill=PerToken(1e-6), reading=ReadTime(rate=1e12))
        cache = cache_of("1MiB")
        loaded = load_prefix(cache, store, name, tokens, costs=costs)
        assert loaded.choice is not None
        assert loaded.choice.read_blocks == 25
        assert 0 < loaded.tokens < 12
        assert loaded.recomputed_tokens == 100 - loaded.tokens
        got = model(input_ids=IDS[:, loaded.tokens :], past_key_values=cache).logits
        torch.testing.assert_close(got, model(input_ids=IDS).logits[:, loaded.tokens :], atol=1e-5, rtol=0)


def test_reads_end_when_a_load_does(
    model: Any, weights: Path, store: Any, cache_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left early, or because the cache was closed: what is not at the drive yet is not read, and nothing reads on."""
    tokens, name = IDS[0].tolist(), identity(model, weights)
    monkeypatch.setattr("penstock.runtime.kv.arriving.AT_ONCE", 1)
    with torch.no_grad():
        first = cache_of()
        model(input_ids=IDS, past_key_values=first)
        store_prefix(first, store, name, tokens)
    plain, asked, ended = store.read, [], []

    def until_left(hit: Any, into: Any, *, wanted: Callable[[], bool]) -> int:
        asked.append(hit)
        late, until_s = len(asked) > 1, time.monotonic() + 60
        while late and wanted() and time.monotonic() < until_s:
            time.sleep(0.001)
        ended.append(int(plain(hit, into, wanted=wanted)))
        return ended[-1]

    monkeypatch.setattr(store, "read", until_left)
    costs = PrefixCosts(prefill=PerToken(1e-9))
    assert load_prefix(cache_of("1MiB"), store, name, tokens, costs=costs).tokens == SIZE
    assert len(ended) == len(asked) < 4
    assert sorted(ended) == [0] * (len(ended) - 1) + [1]

    def closing(hit: Any, into: Any, *, wanted: Callable[[], bool]) -> int:
        asked.append(hit)
        if len(asked) == 3:
            cache.close()
        ended.append(int(plain(hit, into, wanted=wanted)))
        return ended[-1]

    cache = cache_of("1MiB")
    monkeypatch.setattr(store, "read", closing)
    asked.clear()
    ended.clear()
    with pytest.raises(penstock.ClosedError):
        load_prefix(cache, store, name, tokens, always_read=True)
    assert 3 <= len(ended) == len(asked) < 10
    assert cache.tiers._memory is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-prefix")]


def test_a_cache_learns_what_calls_take(model: Any, weights: Path, store: Any, cache_of: Callable[..., Any]) -> None:
    """Two layers of three pass between the first keys and the last ones; the third one is like them."""
    cache = cache_of("1MiB")
    assert cache.prefills.call_s(0, 100) is None
    with torch.no_grad():
        start_s = time.perf_counter()
        model(input_ids=IDS, past_key_values=cache)
        whole_s = time.perf_counter() - start_s
    known_s = cache.prefills.call_s(0, 103)
    assert 0 < known_s < 1.5 * whole_s
    assert cache_of().prefills is cache.prefills, "caches of one model learn together"
    two = torch.cat([IDS, IDS])
    with torch.no_grad():
        model(input_ids=two, past_key_values=cache_of("1MiB"))
    assert cache.prefills.call_s(0, 103) == known_s, "only calls of one sequence are heard"


def test_calls_are_timed_from_layer_to_layer() -> None:
    known, now = MeasuredPrefill(), [10.0]
    watch = CallStopwatch(5, known, clock=lambda: now[0])
    keys = torch.zeros(1, 2, 40, 8)
    for number in range(5):
        watch.passes(number, 7, keys)
        now[0] += 0.25
    assert known.call_s(7, 40) == pytest.approx(1.25)
    watch.passes(0, 47, keys)
    now[0] += 99.0
    watch.passes(4, 7, keys)  # a call that was interrupted, and another one's end
    assert known.call_s(7, 40) == pytest.approx(1.25)


def test_a_calibration_tells_what_prompts_of_a_loaded_model_take(tmp_path: Path) -> None:
    """A short prompt is rehearsed; longer ones that are rehearsed take what is worked out from it."""
    cpu = Processor(
        name="cpu",
        memory_nbytes=2**34,
        memory=Curve.flat(1e9),
        linear={"float32": Curve(x=(1.0, 64.0), y=(1e9, 1e8))},
        attention={"float32": Curve.flat(1e9)},
        launch_s=1e-6,
    )
    drive = Drive(name="d", read=Curve.flat(1e9), write=Curve.flat(1e9))
    costs = CostModel(hardware=Hardware(name="made up", cpu=cpu, host_nbytes=2**34, drives=(drive,)))
    folder = ZOO["llama"].save(tmp_path)
    loaded = penstock.load(folder, max_memory={"host": "64MiB"}, device="cpu")
    assert calibrated_prefill(loaded) is None
    loaded.penstock.machinery.costs = costs
    known = calibrated_prefill(loaded)
    assert known is not None
    for tokens in (64, 100):
        program = Foresight(folder).programs(Workload(batch=1, context=tokens + 2), tokens)[0]
        assert known.call_s(0, tokens) == pytest.approx(costs.compute_s(program.operations(), "gpu"), rel=0.01)
    penstock.close(loaded)
    mixture = penstock.load(ZOO["mixtral"].save(tmp_path / "mixture"), max_memory={"host": "64MiB"}, device="cpu")
    mixture.penstock.machinery.costs = costs
    assert calibrated_prefill(mixture) is None, "a router decides what its prompts take"
    penstock.close(mixture)
