"""Parts computed on the CPU beside a CUDA device: equal to rounding, whatever changes processors when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, load_resident, token_ids
from zoo.budgets import PLENTY, find_budget

import penstock
from penstock.api import _wanted, link_cache
from penstock.devices import open_device
from penstock.runtime import loading
from penstock.runtime.layout import Layout
from penstock.runtime.throughput import Completions
from penstock.runtime.throughput_choice import Sampling
from penstock.runtime.throughput_start import Asked, Limits, start
from penstock.scheduler.microbatches import Schedule, cut
from penstock.scheduler.processors import ALWAYS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Processors = Callable[[nn.Module, Layout], Mapping[int, int]]
FEW = 3
BUSY = 2_000_000
"""Clock cycles on the compute stream before a call: about a millisecond in which a copy could overtake it."""


def below(rows: int, step: int = 1) -> Processors:
    def choose(_: nn.Module, layout: Layout) -> dict[int, int]:
        assert layout.back is not None
        return dict.fromkeys(sorted(layout.back.resident)[::step], rows)

    return choose


def place(folder: Path, budget: dict[str, int], device: str, processors: Processors | None = None) -> Any:
    return loading.load(
        folder,
        wanted=_wanted(budget),
        device=open_device(device),
        dtype="auto",
        disk=(),
        context=None,
        batch=None,
        trust_remote_code=False,
        cache=link_cache(),
        processors=processors,
    )


@contextmanager
def computed(folder: Path, processors: Processors | None) -> Iterator[Any]:
    device = find_budget(partial(place, folder), "cuda", "nothing")["device"]
    model = place(folder, {"device": device, "host": PLENTY}, "cuda", processors)
    try:
        yield model
    finally:
        penstock.close(model)


def calls(model: Any) -> int:
    on_cpu = model.penstock._machinery.session.on_cpu
    return 0 if on_cpu is None else int(on_cpu.computed)


def talk(model: Any, *, encoder: bool = False) -> list[Tensor]:
    """Logits of a prompt, of some tokens, of another prompt and of more tokens, with one cache."""
    state, found = None, []
    with torch.no_grad():
        source = {"input_ids": token_ids().cuda()} if encoder else {}
        for seed, length in ((1, 9), (2, 1), (3, 1), (4, 7), (5, 1), (6, 1)):
            ids = token_ids(seed=seed, length=length).cuda()
            torch.cuda._sleep(BUSY)
            out = model(
                **{**source, "decoder_input_ids" if encoder else "input_ids": ids},
                past_key_values=state,
                use_cache=True,
            )
            state = out.past_key_values
            found.append(out.logits.float().clone())
    return found


def check(expected: list[Tensor], found: list[Tensor], tolerance: float) -> None:
    for a, b in zip(expected, found, strict=True):
        assert b.device.type == "cuda"
        assert bool(b.isfinite().all())
        assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())


@pytest.mark.parametrize(("rows", "step"), [(FEW, 1), (FEW, 2), (ALWAYS, 1)], ids=["decoding", "every other", "always"])
@pytest.mark.parametrize(
    ("name", "tolerance"), [("llama", 1e-4), ("llama-bf16", 6e-2), ("gemma3", 1e-4), ("gpt2", 1e-4), ("t5", 1e-4)]
)
def test_equal_to_rounding(tmp_path: Path, name: str, tolerance: float, rows: int, step: int) -> None:
    folder = ZOO[name].save(tmp_path / name)
    resident: Any = load_resident(folder).cuda()
    expected = talk(resident, encoder=name == "t5")
    with computed(folder, below(rows, step)) as model:
        for _ in range(2):
            check(expected, talk(model, encoder=name == "t5"), tolerance)
        assert calls(model) > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate(tmp_path: Path, options: dict[str, Any]) -> None:
    """fp32 and a small model: rounding does not change a token."""
    folder = ZOO["llama"].save(tmp_path / "llama")
    inputs = {key: value.cuda() for key, value in ZOO["llama"].inputs().items()}
    more = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **options}
    expected = load_resident(folder).cuda().generate(**inputs, **more)  # type: ignore[operator]
    with computed(folder, below(2 * FEW + 1)) as model:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **more), expected)
        assert calls(model) > 0


def test_keys_and_values_lie_where_attention_is_computed(tmp_path: Path) -> None:
    folder = ZOO["llama"].save(tmp_path / "llama")
    with computed(folder, below(FEW)) as model, torch.no_grad():
        ids = token_ids()
        state = model(ids.cuda(), use_cache=True).past_key_values
        assert {layer.keys.device.type for layer in state.layers} == {"cuda"}
        for _ in range(2):
            model(ids[:, :1].cuda(), past_key_values=state)
            assert {layer.keys.device.type for layer in state.layers} == {"cpu"}
        model(ids.cuda(), past_key_values=state)
        assert {layer.keys.device.type for layer in state.layers} == {"cuda"}


def test_lanes_that_alternate(tmp_path: Path) -> None:
    """fp32 and a small model: rounding does not change a token, whichever processor computes for which lane."""
    folder = ZOO["llama"].save(tmp_path / "llama")
    resident: Any = load_resident(folder).cuda()
    prompts = [token_ids(seed=seed, batch=1, length=length) for seed, length in enumerate((5, 9, 9, 12, 7, 20))]
    counts = (4, 8, 6, 8, 5, 7)
    expected = [
        tuple(resident.generate(ids.cuda(), max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist())
        for ids, count in zip(prompts, counts, strict=True)
    ]
    asked = [
        Asked(index=index, ids=tuple(ids[0].tolist()), new_tokens=count, name=f"prompt {index}")
        for index, (ids, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    with computed(folder, below(FEW, 2)) as model:
        for share in (0.0, 0.5, 1.0):
            choice = Schedule(
                batches=cut([each.job for each in asked], 2, pads=True), lanes=3, prefill_tokens=64, nbytes=0,
                sweeps=0, seconds=0.0, cpu_share=share,
            )  # fmt: skip
            run = Completions(
                start(model, asked, Sampling(), limits=Limits(), choice=choice), ordered=True, decode=None
            )
            assert [done.ids for done in run] == expected
            assert (run.statistics().cpu_share > 0) is (share > 0)


def test_on_a_stream_of_the_callers(tmp_path: Path) -> None:
    folder = ZOO["llama"].save(tmp_path / "llama")
    expected = talk(load_resident(folder).cuda())
    with computed(folder, below(FEW)) as model:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = talk(model)
        stream.synchronize()
        check(expected, found, 1e-4)


def test_an_error_leaves_the_weights_to_the_device(tmp_path: Path) -> None:
    folder = ZOO["llama"].save(tmp_path / "llama")
    expected = talk(load_resident(folder).cuda())

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    with computed(folder, below(FEW)) as model:
        handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            talk(model)
        handle.remove()
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        check(expected, talk(model), 1e-4)
