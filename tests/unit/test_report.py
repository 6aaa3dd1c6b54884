"""The report's numbers: what is left out when there are too many, and that hostile names stay data."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from profiles import MIB, header, profile_of, streamed
from report_profiles import idle_of, repeated, summary_of, three_tiers, training

from penstock.report import build
from penstock.report.arrays import Arrays
from penstock.report.bands import telling
from penstock.report.clock import Clock, ranks
from penstock.report.leads import leads
from penstock.report.merging import merge, pack
from penstock.report.names import Names
from penstock.report.residency import residency
from penstock.runtime.profiler.schema import Block, Cause, Compute, Link, Module, Phase, Tier, Transfer, Use

HOSTILE = '</script><script>alert(1)</script><!--" onload="alert(2)\u2028\ud800'
DTYPES = {"u1": np.uint8, "u2": np.uint16, "i4": np.int32, "f4": np.float32, "f8": np.float64}


class _Page(HTMLParser):
    """Scripts and tags of a page, as a browser's parser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or "code" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def document_of(html: str) -> tuple[dict[str, Any], bytes]:
    page = _Page(html)
    return json.loads(page.scripts["document"]), zlib.decompress(base64.b64decode(page.scripts["arrays"]))


def array_of(reference: dict[str, Any], blob: bytes) -> np.ndarray[Any, Any]:
    found = np.frombuffer(blob, dtype=DTYPES[reference["of"]], count=reference["n"], offset=reference["at"])
    return np.cumsum(found.astype(np.float64)) if reference.get("delta") else found


def columns(values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("values", "code"),
    [([], "u1"), ([0, 255], "u1"), ([256], "u2"), ([-1, 3], "i4"), ([2**31], "f8"), ([0.5], "f4")],
)
def test_arrays_come_back_in_the_narrowest_type(values: list[float], code: str) -> None:
    arrays = Arrays()
    arrays.add([7])
    reference = arrays.add(np.array(values) if values else columns([]))
    assert reference["of"] == code
    assert reference["at"] % 8 == 0
    assert array_of(reference, zlib.decompress(base64.b64decode(arrays.encoded()))).tolist() == values


def test_sorted_times_are_kept_as_differences() -> None:
    arrays = Arrays()
    times = columns([10, 10, 300, 70_000])
    reference = arrays.add(times, delta=True)
    assert reference["of"] == "i4"
    assert array_of(reference, zlib.decompress(base64.b64decode(arrays.encoded()))).tolist() == times.tolist()


def test_the_clock_fits_any_run_into_31_bits() -> None:
    hour = 3_600 * 10**9
    clock = Clock.of(profile_of([Compute(module=1, phase=Phase.FORWARD, start=5, end=5 + hour)]))
    assert clock.first_ns == 5
    assert clock.ticks < 2**31
    assert clock.ticks * clock.tick_ns == pytest.approx(hour, rel=1e-6)
    assert clock.at(columns([0, 5, 5 + hour, 2 * hour])).tolist() == [0, 0, clock.ticks, clock.ticks]


def test_ranks_of_unknown_numbers_are_none() -> None:
    assert ranks(columns([2, 5, 9]), columns([5, 2, 3, 10, -1])).tolist() == [1, 0, -1, -1, -1]
    assert ranks(columns([]), columns([5])).tolist() == [-1]


def test_few_spans_stay_as_they_are() -> None:
    made = merge(columns([5, 1]), columns([6, 2]), columns([0, 0]), weight=columns([7, 8]), most=2)
    assert (made.start.tolist(), made.pick.tolist(), made.total.tolist(), made.width) == ([1, 5], [1, 0], [8, 7], 0)


def test_merged_spans_keep_counts_weights_and_what_is_wide() -> None:
    rng = np.random.default_rng(1)
    start = np.sort(rng.integers(0, 1_000_000, 5_000))
    length = np.where(np.arange(5_000) % 500 == 0, 90_000, rng.integers(1, 60, 5_000))
    key = rng.integers(0, 3, 5_000)
    weight = rng.integers(1, 100, 5_000)
    made = merge(start, start + length, key, weight=weight, most=600)
    assert len(made.start) <= 600
    assert made.count.sum() == 5_000
    assert made.total.sum() == weight.sum()
    assert (made.count[made.end - made.start >= 90_000] == 1).sum() == 10
    assert (np.diff(made.start) >= 0).all()
    assert ((made.fill >= 1) & (made.fill <= 255)).all()
    # Every original lies inside a merged span of its key whose representative has the same key.
    for row in range(0, 5_000, 97):
        inside = (made.start <= start[row]) & (made.end >= start[row] + length[row]) & (key[made.pick] == key[row])
        assert inside.any()


def test_nothing_is_merged_in_a_stretch_that_stays_exact() -> None:
    start = np.arange(0, 100_000, 10, dtype=np.int64)
    made = merge(start, start + 8, start * 0, weight=start * 0 + 1, most=400, exact=[(50_000, 51_000)])
    inside = (made.start >= 50_000) & (made.start <= 51_000)
    assert (made.count[inside] == 1).all()
    assert inside.sum() == 101
    assert len(made.start) <= 400
    assert made.exact == ((50_000, 51_000),)


def test_a_stretch_with_too_many_spans_is_merged_too() -> None:
    start = np.arange(0, 100_000, 10, dtype=np.int64)
    made = merge(start, start + 8, start * 0, weight=start * 0 + 1, most=400, exact=[(0, 90_000)])
    assert made.exact == ()
    assert len(made.start) <= 400


def test_overlapping_spans_get_rows_of_their_own() -> None:
    rows, count = pack(columns([0, 5, 10, 12, 30]), columns([10, 20, 15, 22, 40]), most=8)
    assert rows.tolist() == [0, 1, 0, 2, 0]
    assert count == 3
    assert pack(columns([0, 1, 2]), columns([9, 9, 9]), most=2)[1] == 2


def test_thinned_series_keep_the_extremes() -> None:
    rng = np.random.default_rng(2)
    at = np.sort(rng.integers(0, 10**6, 50_000))
    value = rng.integers(0, 10**9, 50_000)
    kept = telling(at, value, 10**6, 2_000)
    assert len(kept) <= 2_000
    assert (np.diff(kept) > 0).all()
    assert value[kept].max() == value.max()
    assert value[kept].min() == value.min()
    assert kept[-1] == 49_999


def test_leads_are_cut_at_zero() -> None:
    uses = [Use(block=0, at=1_000, ready=1_000 + lead, issued=0, module=1) for lead in (-500, -10, 0, 1, 400)]
    found = leads(profile_of([*uses, Use(block=1, at=0, ready=10**9, issued=-1)]))
    assert found is not None
    assert (found["uses"], found["late"]) == (5, 2)
    early = sum(found["counts"][: -found["first"]])
    assert early == 3
    assert sum(found["counts"]) == 5
    assert leads(profile_of([Use(block=0, at=0, ready=0, issued=-1)])) is None


def test_a_block_is_resident_until_its_last_use_or_eviction() -> None:
    def move(number: int, block: int, link: Link, start: int, end: int, cause: Cause = Cause.PREFETCH) -> Transfer:
        return Transfer(id=number, block=block, link=link, nbytes=1, cause=cause, issued=start, start=start, end=end)

    records = [
        move(0, 0, Link.DISK_READ, 0, 10),
        move(1, 0, Link.H2D, 10, 20),
        Use(block=0, at=25, ready=20, issued=0, module=1),
        Compute(module=1, phase=Phase.FORWARD, start=25, end=40, depth=1),
        move(2, 0, Link.DISK_READ, 100, 110),
        move(3, 1, Link.H2D, 50, 60),
        Use(block=1, at=65, ready=60, issued=50, module=2),
        move(4, 1, Link.D2H, 70, 80, Cause.EVICT),
        Compute(module=3, phase=Phase.FORWARD, start=0, end=200, depth=1),
    ]
    profile = profile_of(records)
    arrays = Arrays()
    found = residency(profile, Clock.of(profile), Names.of(profile), arrays, most=100)
    blob = zlib.decompress(base64.b64decode(arrays.encoded()))
    start, length, row, tier = (array_of(found[name], blob).tolist() for name in ("start", "length", "row", "tier"))
    stays = {(row[i], Tier(tier[i]), start[i], start[i] + length[i]) for i in range(len(start))}
    assert stays == {
        (0, Tier.HOST, 10, 20),  # its host slot is free once the copy is done
        (0, Tier.DEVICE, 20, 40),  # until the module that used it is done
        (0, Tier.HOST, 110, 200),  # read again, and not used: there to the end as far as anyone knows
        (1, Tier.DEVICE, 60, 80),
    }
    assert array_of(found["blocks"], blob).tolist()[:2] == [0, 1]


def test_hostile_names_reach_the_page_as_data_only() -> None:
    profile = profile_of(
        [],
        modules={0: Module(path=HOSTILE, kind=HOSTILE, parent=-1)},
        blocks={0: Block(name=HOSTILE, nbytes=MIB, home=Tier.DISK, module=0)},
        strings={0: HOSTILE},
        header=header(argv=(HOSTILE,), machine={HOSTILE: HOSTILE}, versions={"torch": HOSTILE}),
    )
    html = build(profile, summary_of(profile, verdict=HOSTILE), title=HOSTILE)
    html.encode("utf-8")
    page = _Page(html)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" not in page.scripts["code"]
    assert "<" not in page.scripts["document"]
    assert json.loads(page.scripts["document"])["runs"][0]["names"]["modules"][0][0] == HOSTILE


def test_the_page_asks_for_nothing_and_runs_only_its_own_script() -> None:
    html = build(streamed(), summary_of(streamed()))
    assert not re.findall(r"https?://", html)
    assert "default-src 'none'; script-src 'sha256-" in html
    assert not re.search(r"\.innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", html)


def test_paths_and_parents_of_modules_can_be_told_again() -> None:
    document, _ = document_of(build(three_tiers(8, 2), summary_of(three_tiers(8, 2))))
    names = document["runs"][0]["names"]["modules"]
    assert names[0] == ["", "CausalLM", -1, 0]
    assert ["self_attn", "Attention", 2, 1] in names


def test_hops_know_the_ones_before_them() -> None:
    document, blob = document_of(build(three_tiers(9, 2), summary_of(three_tiers(9, 2))))
    transfers = document["runs"][0]["lanes"]["transfers"]
    parent, link, block = (array_of(transfers[name], blob) for name in ("parent", "link", "block"))
    second = np.flatnonzero((parent >= 0) & (link == Link.H2D))
    assert len(second)
    assert (link[parent[second]] == Link.DISK_READ).all()
    assert (block[parent[second]] == block[second]).all()


@pytest.mark.parametrize("profile", [profile_of([]), training(3, 3), streamed(2)], ids=["empty", "plain", "streamed"])
def test_any_run_makes_a_page(profile: Any) -> None:
    document, _ = document_of(build(profile, summary_of(profile), idle_steps=idle_of(profile)))
    assert document["runs"][0]["lanes"]["compute"]["shown"] == len(profile[Compute])


def test_records_that_point_nowhere_are_shown_without_names() -> None:
    records = [
        Compute(module=99, phase=Phase.FORWARD, start=10, end=5),
        Transfer(id=1, block=77, link=Link.H2D, nbytes=-5, cause=Cause.DEMAND, issued=0, start=9, end=9, parent=55),
        Use(block=77, at=3, ready=4, issued=0, module=99),
    ]
    document, blob = document_of(build(profile_of(records), summary_of(profile_of(records))))
    transfers = document["runs"][0]["lanes"]["transfers"]
    assert array_of(transfers["block"], blob).tolist() == [-1]
    assert array_of(transfers["parent"], blob).tolist() == [-2]


def test_problems_of_the_file_and_losses_are_said() -> None:
    profile = streamed()
    profile.problems = ("segment 3 is damaged",)
    document, _ = document_of(build(profile, summary_of(profile, dropped=12, recorded=100)))
    notes = document["runs"][0]["notes"]
    assert notes == ["12 of 100 records (12.0%) were lost: the ring was full.", "segment 3 is damaged"]


def test_infinite_figures_are_left_out() -> None:
    document, _ = document_of(build(streamed(), summary_of(streamed(), distance=float("inf"))))
    assert document["runs"][0]["summary"]["distance"] is None


def test_ten_minutes_fit_five_megabytes_and_eight_seconds() -> None:
    profile = repeated(three_tiers(), 340)
    assert sum(len(found) for found in profile.columns.values()) > 2_400_000
    summary, idle = summary_of(profile), idle_of(profile)
    began = time.monotonic()
    html = build(profile, summary, idle_steps=idle)
    assert time.monotonic() - began < 8
    assert len(html) < 5 * 10**6


def test_the_report_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, penstock.report; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
