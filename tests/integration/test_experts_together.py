"""Many prompts through one mixture: an expert is read at most once per layer and sweep, and tokens are those of one
prompt at a time."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_experts
import test_experts_apart
import torch
from test_experts import Shelf
from zoo.decoders import token_ids

import penstock
from penstock.scheduler.experts import prefetch
from penstock.scheduler.experts.events import Event

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]

NEW = 5
PROMPTS = [token_ids(seed=seed, batch=1, length=7)[0].tolist() for seed in range(6)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("experts-together"))


class Watched:
    """Every layer of experts that runs, and the logits of each call of the model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.logits: dict[int, list[torch.Tensor]] = {}
        pool = model.penstock.machinery.session.experts.pool
        layer = pool.layer

        @contextmanager
        def noted(event: Event, **options: Any) -> Any:
            self.events.append(event)
            with layer(event, **options) as run:
                yield run

        monkeypatch.setattr(pool, "layer", noted)
        model.register_forward_hook(self._look)

    def _look(self, module: Any, args: Any, result: Any) -> None:
        self.logits.setdefault(threading.get_ident(), []).append(result.logits[:, -1].clone())


def alone(model: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The tokens of each prompt, one at a time, and all logits in that order."""
    tokens, logits = [], []
    for ids in PROMPTS:
        given = torch.tensor([ids])
        found = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(found.sequences[0, len(ids) :].tolist())
        logits += [one.clone() for one in found.logits]
    return tokens, logits


def read_nbytes(model: Any) -> tuple[int, int]:
    """Bytes read from files so far, rows of tables left out; and those that the pool says experts were read for."""
    found = model.penstock.statistics()
    counted = found.experts.prefill.read_nbytes + found.experts.decode.read_nbytes
    return found.disk_read_nbytes - found.rows_read_nbytes, counted


@pytest.mark.parametrize(("name", "part"), [("qwen3-moe", 0.6), ("gpt-oss", 0.0)])
def test_an_expert_is_read_once_per_layer_and_sweep(
    name: str, part: float, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with test_experts.loaded(shelf.checkpoint(name), part) as model:
        tokens, logits = alone(model)
        watched = Watched(model, monkeypatch)
        plan, routing = model.penstock.plan, model.penstock.machinery.layout.experts.routing
        before = read_nbytes(model)
        with penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=1, lanes=len(PROMPTS)) as run:
            found = {each.index: list(each.ids) for each in run}
            sweeps = run.statistics().sweeps
        after = read_nbytes(model)
        assert [found[index] for index in range(len(PROMPTS))] == tokens
        seen = [one for each in watched.logits.values() for one in each]
        assert len(seen) == len(logits)
        assert all(any(torch.equal(one, other) for other in seen) for one in logits)
        # all tokens of a sweep pass a layer together
        assert Counter(event.layer for event in watched.events) == dict.fromkeys(range(routing.layers), sweeps)
        assert sum(event.tokens for event in watched.events if event.layer == 0) == len(PROMPTS) * (7 + NEW - 1)
        # what was read was missed by such a layer; an expert that was there has not been read at all
        needed = sum(len(event.experts) for event in watched.events) * (plan.expert_slots < routing.total)
        each = model.penstock.machinery.layout.experts.read_nbytes
        assert 0 < after[1] - before[1] <= needed * each
        if {block.home for block in plan.blocks[: plan.first_expert]} == {"host"}:
            assert 0 < after[0] - before[0] <= after[1] - before[1]


def test_fewer_bytes_than_one_at_a_time(shelf: Shelf) -> None:
    with test_experts.loaded(shelf.checkpoint("mixtral"), 0.3) as model:
        begun = read_nbytes(model)[1]
        alone(model)
        one_at_a_time = read_nbytes(model)[1] - begun
        list(penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=1, lanes=len(PROMPTS)))
        assert read_nbytes(model)[1] - begun - one_at_a_time < one_at_a_time / 2


@pytest.mark.parametrize("host", [0.3, 1.0])
def test_beside_a_device_apart(host: float, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    with test_experts_apart.loaded(shelf.checkpoint("qwen3-moe"), 0.3, host) as model:
        tokens, _ = alone(model)
        watched = Watched(model, monkeypatch)
        copied = [model.penstock.statistics().experts.decode.copied_nbytes]
        found = {
            each.index: list(each.ids)
            for each in penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=2, lanes=3)
        }
        assert [found[index] for index in range(len(PROMPTS))] == tokens
        assert max(Counter((event.step, event.layer) for event in watched.events).values()) == 1
        assert model.penstock.statistics().experts.decode.copied_nbytes > copied[0]


def test_a_read_that_fails_ends_the_run_and_the_next_one_is_right(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.entry("mixtral", torch.float32).save(tmp_path / "short")
    whole = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    with test_experts.loaded(folder, 0.2) as model:
        tokens, _ = alone(model)
        for path in whole:
            with path.open("r+b") as file:
                file.truncate(4096)
        with pytest.raises(penstock.PenstockError, match="safetensors"):
            list(penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=2, lanes=3))
        for path, data in whole.items():
            with path.open("r+b") as file:
                file.write(data)
        found = {
            each.index: list(each.ids)
            for each in penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=2, lanes=3)
        }
        assert [found[index] for index in range(len(PROMPTS))] == tokens


@pytest.mark.parametrize("part", [0.4, 0.8])
def test_what_is_brought_ahead_of_a_sweep_changes_no_bit(
    part: float, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "SURE", 0.0)  # routers of random weights are seldom right
    with test_experts.loaded(shelf.checkpoint("qwen3-moe"), part) as model:
        tokens, logits = alone(model)
        model.penstock.machinery.session.experts.look_ahead(test_experts.SLOW_DRIVE)
        watched = Watched(model, monkeypatch)
        with penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=1, lanes=len(PROMPTS)) as run:
            found = {each.index: list(each.ids) for each in run}
        assert [found[index] for index in range(len(PROMPTS))] == tokens
        seen = [one for each in watched.logits.values() for one in each]
        assert all(any(torch.equal(one, other) for other in seen) for one in logits)
        counted = model.penstock.statistics().experts
        assert counted.prefetching.asked > 0
        assert counted.decode.hits["prefetched"] == counted.prefetching.used > 0
        asked = [event for event in watched.events if event.guesses is not None]
        assert asked
        assert {event.phase for event in asked} == {"decode"}
        assert max(event.tokens for event in asked) == len(PROMPTS)  # one question for all of them
