"""Plans as files: read back as they were, refused where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.plan import Links, Plan, PlannedBlock
from penstock.scheduler.planfile import read_plan, write_plan

blocks = st.builds(
    PlannedBlock,
    id=st.just(0),
    name=st.text(max_size=20),
    nbytes=st.integers(0, 2**40),
    slot_nbytes=st.integers(0, 2**40),
    home=st.sampled_from(["device", "host", "disk"]),
    processor=st.sampled_from(["device", "cpu"]),
    cpu_rows_below=st.integers(0, 2**62),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    found = draw(st.lists(blocks, max_size=4))
    import dataclasses

    sizes = st.integers(0, 2**50)
    return Plan(
        device=draw(st.sampled_from(["cpu", "cuda:0", "emulated"])),
        emulated=draw(st.booleans()),
        resident=draw(st.booleans()),
        weights_nbytes=draw(sizes),
        blocks=tuple(dataclasses.replace(block, id=number) for number, block in enumerate(found)),
        tables=tuple(draw(st.lists(st.text(max_size=10), max_size=2))),
        host_nbytes=draw(sizes),
        host_budget_nbytes=draw(sizes),
        device_nbytes=draw(sizes),
        device_budget_nbytes=draw(st.none() | sizes),
        slots=draw(st.integers(0, 64)),
        slot_nbytes=draw(sizes),
        host_slots=draw(st.integers(0, 64)),
        host_slot_nbytes=draw(sizes),
        limit_nbytes=draw(sizes),
        disk_nbytes_per_sweep=draw(sizes),
        link_nbytes_per_sweep=draw(sizes),
        links=Links(disk_read=draw(st.none() | st.floats(1, 1e12))),
        depth=draw(st.integers(0, 64)),
        notes=tuple(draw(st.lists(st.text(max_size=10), max_size=2))),
    )


@given(plans())
def test_a_plan_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(path, plan)
    assert read_plan(path) == plan


@pytest.fixture
def written(tmp_path: Path) -> Path:
    plan = Plan(
        device="cpu", emulated=False, resident=False, weights_nbytes=10, tables=(), host_nbytes=5,
        blocks=tuple(PlannedBlock(id=i, name=f"b{i}", nbytes=5, slot_nbytes=5, home="host") for i in range(2)),
        host_budget_nbytes=8, device_nbytes=0, device_budget_nbytes=None, slots=2, slot_nbytes=5, host_slots=0,
        host_slot_nbytes=0, limit_nbytes=5, disk_nbytes_per_sweep=5, link_nbytes_per_sweep=0, links=Links(), depth=1,
    )  # fmt: skip
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    return path


def test_a_file_that_is_there_is_not_replaced_unasked(written: Path) -> None:
    plan = read_plan(written)
    with pytest.raises(UsageError, match="--force"):
        write_plan(written, plan)
    write_plan(written, plan, force=True)


def _edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document["plan"].update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slots": -1}, "slots is -1"),
        ({"slots": "two"}, "Expected `int`"),
        ({"blocks": [{"id": 1, "name": "b", "nbytes": 1, "slot_nbytes": 1, "home": "host"}]}, "numbered 0, 1, 2"),
        ({"blocks": [{"id": 0, "name": "b", "nbytes": 1, "slot_nbytes": 1, "home": "attic"}]}, "attic"),
        ({"device": None}, "Expected `str`"),
    ],
)
def test_what_has_no_meaning_is_refused_with_what_it_is(written: Path, changes: dict[str, Any], said: str) -> None:
    _edit(written, **changes)
    with pytest.raises(UsageError, match=said):
        read_plan(written)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x", "plan": {}}', "\x00\x01", '{"other": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="no plan that this version can read"):
        read_plan(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "missing.json")
