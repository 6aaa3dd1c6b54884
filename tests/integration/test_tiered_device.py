"""Keys and values on a device, in host memory and on disk give what transformers' own cache gives, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tiered_cache import bart, check, gemma, generate, llama, model_of, prompts

import penstock
from penstock.devices import open_device
from penstock.scheduler.kv.balance import Balance

LINK = "emulated:h2d=256MiB/s,d2h=256MiB/s"


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made = []

    def make(
        model: Any,
        *,
        device: str = "128KiB",
        host: str = "256KiB",
        disk: str = "16MiB",
        block_tokens: int = 4,
        where: Any = LINK,
    ) -> Any:
        budget = {"device": device, "host": host, "disk": disk}
        cache = penstock.TieredCache(
            model.config, max_memory=budget, block_tokens=block_tokens, disk=tmp_path, device=where
        )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()
    assert not list(tmp_path.glob("*/")), "a folder was left behind"


@pytest.mark.parametrize(
    ("make", "rows", "padding", "kwargs"),
    [
        (llama, 1, 0, {}),
        (gemma, 3, 7, {}),
        (llama, 3, 15, {"prefill_chunk_size": 24}),
        (llama, 2, 0, {"num_beams": 3}),
    ],
)
def test_generation_equals_that_of_a_resident_cache(
    make: Callable[[], Any], rows: int, padding: int, kwargs: Any, caches: Callable[..., Any]
) -> None:
    model = model_of(make)
    many = rows * kwargs.get("num_beams", 1) > 1
    device, host = ("320KiB", "640KiB") if many else ("128KiB", "256KiB")
    for _ in range(2):  # the second one knows from its first call on that blocks will do
        cache = caches(model, device=device, host=host)
        check(model, cache, prompts(rows, padding=padding), **kwargs)
        figures = cache.statistics()
        assert 0 < figures.device_nbytes <= figures.device_budget_nbytes
        assert figures.host_nbytes <= figures.host_budget_nbytes
        assert figures.sent_nbytes > 0
    assert figures.fetched_nbytes > 0, "nothing that was in host memory crossed the link"


def test_what_fits_the_device_never_leaves_it(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, device="4MiB")
    check(model, cache, prompts(2))
    figures = cache.statistics()
    assert (figures.sent_nbytes, figures.fetched_nbytes, figures.written_nbytes) == (0, 0, 0)
    assert figures.device_nbytes > 0
    assert figures.host_nbytes == figures.disk_nbytes == 0


def test_a_device_that_a_prompt_just_fits_is_not_emptied_for_a_next_one(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    with torch.no_grad():
        cache = caches(model, device="512KiB")  # shares of 37 slots of a page; 100 tokens are 25
        model(**prompts(1), past_key_values=cache)
        figures = cache.statistics()
    assert figures.sent_nbytes == 0
    assert figures.device_nbytes == 3 * 25 * 4096


def test_each_block_is_sent_once_and_written_once(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model)
    generate(model, prompts(1), past_key_values=cache)
    figures = cache.statistics()
    slot = cache.tiers.layouts()[0].slot_nbytes
    blocks = 3 * (figures.tokens // 4 + 1)
    on_device, in_host = figures.device_nbytes // slot, figures.host_nbytes // slot
    assert figures.sent_nbytes // slot <= blocks - on_device + 3 * 2, "room for as many again is made ahead"
    assert figures.written_nbytes // slot <= blocks - on_device - in_host + 3 * 4
    assert figures.disk_nbytes > 0


def test_without_a_disk_the_host_takes_what_leaves_the_device(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    cache = caches(model, host="4MiB", disk="0")
    check(model, cache, prompts(1))
    figures = cache.statistics()
    assert figures.sent_nbytes > 0
    assert figures.written_nbytes == figures.disk_nbytes == 0


def test_a_ring_that_is_made_anew_waits_for_what_read_the_one_before(
    caches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = open_device(LINK)
    computed: list[object] = []
    waited: list[object] = []

    def mark() -> object:  # the emulated device computes at once, and has no event for it
        computed.append(object())
        return computed[-1]

    def known(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda event: call(None if event in computed else event)

    # whatever the link's speed comes out as today
    monkeypatch.setattr(Balance, "to_cross", lambda balance, queries, *, pieces, nbytes: pieces)
    monkeypatch.setattr(device, "computed", mark)
    monkeypatch.setattr(device, "wait", known(device.wait))
    copies_wait = known(device.copies_wait)
    monkeypatch.setattr(device, "copies_wait", lambda event: (waited.append(event), copies_wait(event))[1])
    model = model_of(llama)
    cache = caches(model, host="4MiB", disk="0", where=device)
    generate(model, prompts(1), past_key_values=cache)
    assert waited[0] is None
    last = cache.tiers.reader.crossing.attended
    assert last in computed
    cache.reset()
    del waited[:]
    generate(model, prompts(1), past_key_values=cache)
    assert waited[0] is last
    cache.close()
    device.close()


def test_turns_crops_and_rows_that_part(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    for cache in (caches(model), caches(model)):
        ids = prompts(1)["input_ids"]
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=True).past_key_values
            model(input_ids=ids, past_key_values=cache)
            for keep, seed in ((70, 1), (41, 2), (9, 3)):
                more = torch.randint(1, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
                for one in (plain, cache):
                    one.crop(keep - one.get_seq_length())
                expected, got = (model(input_ids=more, past_key_values=one).logits for one in (plain, cache))
                assert (got - expected).abs().max() <= 1e-5
            plain.batch_repeat_interleave(2)
            cache.batch_repeat_interleave(2)
            more = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(4))
            expected, got = (model(input_ids=more, past_key_values=one).logits for one in (plain, cache))
            assert (got - expected).abs().max() <= 1e-5


def test_an_encoder_decoder(caches: Callable[..., Any]) -> None:
    model = model_of(bart)
    check(model, caches(model), prompts(1, tokens=20))


def test_a_streamed_model_and_its_cache_share_the_links(caches: Callable[..., Any]) -> None:
    model = model_of(llama)
    plain = model_of(llama)
    penstock.offload(model, max_memory={"device": "160KiB", "host": "64MiB"}, device=LINK)
    try:
        cache = caches(model, where=model.penstock.device)
        check_against(plain, model, cache)
    finally:
        penstock.close(model)


def check_against(plain: Any, model: Any, cache: Any) -> None:
    expected = generate(plain, prompts(1))
    got = generate(model, prompts(1), past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits, strict=True)) <= 1e-5


def test_arguments(tmp_path: Path) -> None:
    config = llama().config
    with pytest.raises(penstock.UsageError, match="cpu has no memory of its own"):
        penstock.TieredCache(config, max_memory={"device": "1MiB", "host": "1MiB"}, device="cpu")
    device = open_device("cpu")
    with pytest.raises(penstock.UsageError, match="cpu has no memory of its own"):
        penstock.TieredCache(config, max_memory={"device": "1MiB", "host": "1MiB"}, device=device)
    model = model_of(llama)
    budget = {"device": "8KiB", "host": "1MiB", "disk": "1MiB"}
    cache = penstock.TieredCache(model.config, max_memory=budget, disk=tmp_path, device=LINK)
    with torch.no_grad(), pytest.raises(penstock.DoesNotFitError, match="of device memory") as raised:
        model(**prompts(1), past_key_values=cache)
    assert raised.value.tier == "device"
    cache.close()


def test_codecs_are_refused_beside_a_device() -> None:
    budget = {"device": "1MiB", "host": "1MiB"}
    with pytest.raises(penstock.UsageError, match="coded in host memory and on disk"):
        penstock.TieredCache(llama().config, max_memory=budget, device=LINK, codec="int8")
