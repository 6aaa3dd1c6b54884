"""Whether micro-batches alternate between two processors, by what a calibration says and a budget has room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_oncpu import budget
from test_plan_files import machine
from test_throughput import alone, ragged
from zoo import ZOO, load_resident
from zoo.budgets import PLENTY

import penstock
from penstock.api import link_cache
from penstock.arguments import wanted_of
from penstock.devices import open_device
from penstock.runtime import loading
from penstock.runtime.deciding import Decisions, alternation_of
from penstock.runtime.throughput import Completions
from penstock.scheduler.cost import CostModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEW = 6
PROMPTS = ragged(5, 9, 12, 12, 7, 20, 30, 5)


@pytest.fixture(autouse=True, scope="module")
def one_core_for_each_processor() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ZOO["llama"].save(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return load_resident(folder)


@contextmanager
def loaded(folder: Path, *, link: float = 1e8, cpu: float = 1e9, exact: bool = False) -> Iterator[Any]:
    """A model for two micro-batches of two prompts, on the emulated device, at rates that are said to be measured."""
    costs = CostModel(hardware=machine(link=link, cpu=cpu))
    model: Any = loading.load(
        folder,
        wanted=wanted_of({"device": budget(folder, "nothing")["device"], "host": PLENTY}),
        device=open_device(f"emulated:h2d={int(link) >> 20}MiB/s,d2h=20GiB/s,disk=20GiB/s"),
        dtype="auto",
        disk=[],
        context=None,
        batch=None,
        trust_remote_code=False,
        cache=link_cache(),
        decisions=Decisions(costs=costs, rows=2, exact=exact, lanes=2),
        costs=costs,
    )
    try:
        yield model
    finally:
        penstock.close(model)


def run_of(model: Any) -> Completions:
    return penstock.generate_many(model, PROMPTS, max_new_tokens=NEW, rows=2, lanes=2, ordered=True)


@pytest.mark.parametrize(
    ("link", "cpu", "exact", "alternates"),
    [(1e8, 1e9, False, True), (1e8, 1e9, True, False), (2e10, 1e8, False, False)],
)
def test_a_calibration_decides_whether_lanes_alternate(
    folder: Path, resident: Any, link: float, cpu: float, exact: bool, alternates: bool
) -> None:
    with loaded(folder, link=link, cpu=cpu, exact=exact) as model:
        run = run_of(model)
        assert [done.ids for done in run] == alone(resident, PROMPTS, do_sample=False)
        reached = run.statistics()
        assert (reached.schedule.cpu_share > 0) is alternates
        assert (reached.cpu_share > 0) is alternates
        told = str(penstock.explain(model))
        assert ("many prompts at once" in told) is bool(model.penstock.plan.on_cpu())
        assert ("2 micro-batches of 2 alternate between the processors" in told) is alternates


def test_a_named_host_budget_bounds_keys_and_values(folder: Path, resident: Any) -> None:
    """The budget leaves room for those of no layer, of two fifths of them, and of all."""
    with loaded(folder) as model:
        machinery = model.penstock._machinery
        assert machinery.host_left_nbytes == PLENTY - machinery.layout.host_nbytes
        alternation = alternation_of(model, machinery.layout, machinery.units, machinery.plan, machinery.costs)
        most = 4 * (30 + NEW) * 1280
        shares = []
        for left in (0, int(0.45 * most), 2 * most):
            machinery.host_left_nbytes = left
            run = run_of(model)
            assert [done.ids for done in run] == alone(resident, PROMPTS, do_sample=False)
            share = run.statistics().schedule.cpu_share
            keys = alternation.of(share, rows=2, lanes=2).keys
            tokens = sorted(batch.kv_tokens for batch in run.statistics().schedule.batches)[-2:]
            assert keys * 1280 * sum(tokens) <= left + 1e-3  # a share is a sum that is rounded
            shares.append(share)
        assert shares[0] <= shares[1] < shares[2]
