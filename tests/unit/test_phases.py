"""Which parts run once per answer, and what that means for what stays."""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from zoo import ZOO

from penstock.runtime.backing import ModuleBacking
from penstock.runtime.layout import Budgets, Layout
from penstock.runtime.partition import streamable
from penstock.runtime.phases import once_per_answer
from penstock.runtime.planning import Planner


def layout_of(module: nn.Module, host: int) -> Layout:
    budgets = Budgets(host=host, device=None, disk_rate=1e9, link_rate=1e10)
    return Planner(module, ModuleBacking(streamable(module)), budgets, buffers_nbytes=0, keep_skew=True).best()


@pytest.mark.parametrize("name", ["t5", "t5-gated-bf16", "bart", "whisper"])
def test_what_runs_once_is_what_generate_calls_once(name: str) -> None:
    entry = ZOO[name]
    module = entry.make().eval()
    calls: Counter[str] = Counter()
    for path, child in module.named_modules():
        if any(True for _ in child.parameters(recurse=False)):
            child.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
    assert entry.generate is not None
    with torch.no_grad():
        entry.generate(module, entry.inputs())
    once = once_per_answer(module)
    assert {path for path, count in calls.items() if count == 1} == once & calls.keys()
    assert set(calls.values()) == {1, max(calls.values())}
    assert max(calls.values()) >= 4
    kept = [path for path in once & calls.keys() if ".decoder." in f".{path}"]
    assert len(kept) == 2 * 3, kept  # keys and values of three layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "clip", "u-net"])
def test_models_without_an_encoder_of_their_own(name: str) -> None:
    assert once_per_answer(ZOO[name].make()) == frozenset()


def test_a_plain_module_has_no_such_parts() -> None:
    assert once_per_answer(nn.Linear(2, 2)) == frozenset()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_the_decoder_stays_before_the_encoder(share: float) -> None:
    module = ZOO["bart"].make()
    total = sum(p.nbytes for p in module.parameters())
    own = layout_of(module, 2**40).own_host_nbytes
    layout = layout_of(module, own + int(total * share))
    names = {block.id: {portion.name for portion in block.portions} for block in layout.blocks}
    streamed = set().union(*(names[block.id] for block in layout.on_disk()))
    kept = set().union(*(names[block] for block in layout.front.resident if block))
    assert any(name.startswith("model.encoder.layers") for name in streamed)
    if any(name.startswith("model.decoder.layers") for name in streamed):
        assert not any(name.startswith("model.encoder.layers") for name in kept)
    for number in names.keys() - {0}:
        seldom = {
            n.startswith("model.encoder.") or re.search(r"encoder_attn\.[kv]_proj", n) is not None
            for n in names[number]
        }
        assert seldom == {number in layout.seldom}  # no block is of both kinds
