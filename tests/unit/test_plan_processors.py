"""What a plan tells about blocks that the CPU computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.cli.generation import plan_summary
from penstock.runtime.explain import Explanation
from penstock.scheduler.plan import Home, Links, Plan, PlannedBlock
from penstock.scheduler.processors import ALWAYS

GIB = 2**30


def block(number: int, home: Home, rows: int = 0) -> PlannedBlock:
    return PlannedBlock(
        id=number,
        name=f"layer {number}",
        nbytes=GIB,
        slot_nbytes=GIB,
        home=home,
        processor="cpu" if rows else "device",
        cpu_rows_below=rows,
    )


def plan(*blocks: PlannedBlock, link_nbytes: int = 0) -> Plan:
    return Plan(
        device="cuda:0",
        emulated=False,
        resident=False,
        weights_nbytes=len(blocks) * GIB,
        blocks=blocks,
        tables=(),
        host_nbytes=4 * GIB,
        host_budget_nbytes=8 * GIB,
        device_nbytes=2 * GIB,
        device_budget_nbytes=2 * GIB,
        slots=2,
        slot_nbytes=GIB,
        host_slots=2,
        disk_nbytes_per_sweep=0,
        link_nbytes_per_sweep=link_nbytes,
        links=Links(h2d=10.0 * GIB),
        depth=1,
    )


def test_blocks_and_their_threshold() -> None:
    some = plan(block(0, "device"), block(1, "host", 16), block(2, "host", 16), block(3, "host"), link_nbytes=GIB)
    text = str(Explanation(some))
    assert "2 blocks (2.00 GiB) computed on the CPU below 16 tokens" in text
    assert "would end all copying" in text
    assert plan_summary(some)["on_cpu"] == {"blocks": 2, "nbytes": 2 * GIB}
    assert some.terms == {"host-to-device link": 0.1}
    assert "many prompts at once: as much of that as pays" in text
    assert some.with_all_copied().terms == {"host-to-device link": pytest.approx(0.3)}
    assert some.with_all_copied(0.5).terms == {"host-to-device link": pytest.approx(0.2)}


def test_several_thresholds_and_none() -> None:
    assert "below 4 to 16 tokens" in str(Explanation(plan(block(0, "host", 4), block(1, "host", 16))))
    assert "below 4 to any number of tokens" in str(Explanation(plan(block(0, "host", 4), block(1, "host", ALWAYS))))
    always = plan(block(0, "host", ALWAYS))
    assert "1 blocks (1.00 GiB) computed on the CPU\n" in str(Explanation(always))
    assert "would leave nothing to the CPU" in str(Explanation(always))
    nothing = replace(always, blocks=(block(0, "host"),))
    assert "CPU" not in str(Explanation(nothing)).replace("to the CPU", "")
